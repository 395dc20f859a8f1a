"""What both sides agree on; imports neither side."""

import os

# onnxruntime tells its maker of every session, unless this is set before it is imported for the first time.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
