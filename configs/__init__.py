"""Hydra configuration files; see docs/configuration.md."""
