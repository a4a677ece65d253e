"""The sizes of a head that pages can hold. Imports nothing: the command line asks before it loads torch."""

DENSE_HEAD_DIMS = range(32, 257, 16)
COMPRESSED_HEAD_DIMS = range(64, 257, 32)  # codes lie in blocks of 32 columns, two of which may share their bytes


def rotation_dim(head_dim: int) -> int:
    """Channels that a rotation of values mixes: the largest power of two that divides head_dim."""
    return head_dim & -head_dim


def check_compressed(head_dim: int, policy: str, model: str) -> None:
    """Refuse a head that coded pages cannot hold.

    Args:
        policy, model: what to call them in the message.

    Raises:
        ValueError: the message names the sizes that fit, and what works instead.
    """
    if head_dim not in COMPRESSED_HEAD_DIMS:
        raise ValueError(
            f"policy {policy} supports head_dim {', '.join(map(str, COMPRESSED_HEAD_DIMS))}, {model} has {head_dim}; "
            "use --policy none"
        )
