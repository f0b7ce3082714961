"""Public-domain speeches and questions for `prophetkv-rag demo`; their origin is in the README beside this file."""
