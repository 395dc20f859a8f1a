"""What both sides agree on; imports neither side."""

import os
import sys

# onnxruntime tells its maker of every session, unless this is set before it is imported for the first time.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# MONAI imports jsonschema, and that a grammar of web addresses which takes a second and more to build in every process;
# nothing here validates JSON Schemas.
sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]
