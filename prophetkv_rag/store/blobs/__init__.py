"""One chunk cache as one file: written completely or not at all, and read with every byte checked.

In comes a `ChunkCache`; out comes the same from its file, or a `BlobError` that says what is wrong with it. Begin
reading with `header.py` and `blob.py` (what is in it), then `formats.py` (as the model made them, or smaller),
`file.py` (reading) and `files.py` (the directory of them).
"""

from prophetkv_rag.store.blobs.blob import decode_blob, encode_blob
from prophetkv_rag.store.blobs.file import decode_file
from prophetkv_rag.store.blobs.files import BlobFiles
from prophetkv_rag.store.blobs.formats import BlobFormat, check_format

__all__ = ["BlobFiles", "BlobFormat", "check_format", "decode_blob", "decode_file", "encode_blob"]
