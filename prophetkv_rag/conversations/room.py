"""Keeping to the limit: which rows go where there is no room for all."""

from __future__ import annotations

from prophetkv_rag.conversations.tree import Node


def make_room(roots: dict[str, Node], max_bytes: int, clock: int) -> None:
    """Drop the least recently used ends, ends before beginnings, of tenants that hold more than their equal share.

    Args:
        roots: Each tenant's tree; one of which nothing is left is taken out.
        max_bytes: Most bytes of all of them.
        clock: The time of what was written last, of which as much of the beginning is kept as fits.
    """
    sizes = {tenant: sum(node.nbytes for node in root.below()) for tenant, root in roots.items()}
    while (excess := sum(sizes.values()) - max_bytes) > 0:
        share = max_bytes / len(sizes)
        leaves = [
            (node.used, -node.start, tenant, node)
            for tenant, root in roots.items()
            if sizes[tenant] > share
            for node in root.below()
            if not node.children and node.parent is not None
        ]
        _, _, tenant, leaf = min(leaves, key=lambda found: found[:3])
        before, num_rows = leaf.nbytes, int(leaf.token_ids.shape[0])
        kept = num_rows - -(-excess * num_rows // before)
        if leaf.used == clock and kept > 0:  # just written: as much of its beginning as fits
            leaf.cut(kept)
            sizes[tenant] -= before - leaf.nbytes
            continue
        sizes[tenant] -= before
        leaf.remove()
        if not roots[tenant].children:
            del roots[tenant], sizes[tenant]
