"""The command line: `prophetkv-rag`, one module per command."""
