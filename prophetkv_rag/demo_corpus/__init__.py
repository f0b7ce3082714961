"""Public-domain speeches and questions for `prophetkv-rag demo`; the README beside this file says where they come from."""
