"""Where chunk caches are kept: in RAM (`memory`), or on disk with a RAM tier in front (`disk`)."""
