"""Many random damages to blobs, faster than hypothesis draws them: `run(100_000, seed)` takes about a minute."""

from __future__ import annotations

import random

from tests.store.blobs.test_formats import BLOBS, check_damaged


def damage(generator: random.Random) -> tuple[str, bytes]:
    blob_format, blob = generator.choice(BLOBS)
    data = bytearray(blob)
    header_end = 8 + int.from_bytes(blob[:8], "little")
    for _ in range(generator.choice([1, 1, 2, 5])):
        kind = generator.randrange(6)
        # Half of the damage goes to the header, where all decisions are made.
        place = generator.randrange(min(len(data), header_end) if generator.random() < 0.5 else len(data) or 1)
        if not data:
            break
        if kind == 0:
            data[place % len(data)] ^= 1 << generator.randrange(8)
        elif kind == 1:
            data[place % len(data)] = generator.choice(b'0123456789{}[],":-. \x00\xff')
        elif kind == 2:
            del data[place : place + generator.choice([1, 2, 8, 100])]
        elif kind == 3:
            data[place:place] = generator.randbytes(generator.choice([1, 2, 8]))
        elif kind == 4:
            other = generator.choice(BLOBS)[1]
            data[place : place + 40] = other[place : place + 40]
        else:
            data[place : place + 8] = generator.choice([b"\xff" * 8, b"\0" * 8, b"99999999"])
    return blob_format, bytes(data)


def run(count: int, seed: int) -> int:
    generator = random.Random(seed)
    for _ in range(count):
        check_damaged(damage(generator))  # type: ignore[arg-type]
    return count
