"""Inside a hospital; a DICOM dataset never leaves this folder."""
