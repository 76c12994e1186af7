"""Addresses: of a store, such as s3://bucket/runs/demo, or of a directory of this machine."""


def is_address(place: str) -> bool:
    """Whether it names a store and not a directory of this machine."""
    return "://" in place and not place.startswith("file://")
