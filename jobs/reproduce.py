"""`ddiff reproduce`: a picture painted again from the text inside its PNG, and compared to the bit."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dd_core import bundle, images, sealed
from dd_core.devices import nearest
from dd_core.precision import round_products
from jobs.order import Order, refuse_order
from jobs.provenance import PICTURES, Told, here, told_by
from jobs.sample import begun, painted, refuse, state_of

OPTIONS = {"image": "--image", "other": "a second --image", "mask": "--mask", "reference": "--reference"}


def reproduce(picture: Path, cascade: Path, given: Mapping[str, Path]) -> dict[str, Any]:
    """Paint a picture again.

    Args:
        picture: A PNG that `ddiff sample` or an endpoint painted.
        cascade: Directory of the cascade that it was painted by.
        given: The pictures that it was made from, by field of an order.

    Returns:
        The seed and the cascade that it was painted with.

    Raises:
        ValueError: Its text says too little, or names another cascade or other pictures; or the picture
            painted now differs, and the message says how much.
        sealed.SealError: The cascade is damaged or unfinished.
    """
    told = told_by(picture)
    refuse_other_pictures(told, given)
    order = Order(**{**told.asked, **given})
    refuse_order(order)
    round_products(nearest(), order.precision)
    opened = bundle.load_cascade(cascade, device=nearest(), precision=order.precision)
    if opened.digest != told.cascade:
        raise ValueError(
            f"{picture} was painted by cascade {told.cascade[:12]}, and {cascade} is {opened.digest[:12]}; "
            "name that one"
        )
    before = len(opened.hops) - len(told.how)
    if before < 0:
        raise ValueError(f"{picture}: its text is of {len(told.how)} hops, the cascade has fewer")
    how = [*(hop.how for hop in opened.spec.hops[:before]), *told.how]
    asked = state_of(order, opened.spec)
    refuse(order, opened, asked, how)
    made = painted(begun(order, opened, asked, how), order.seed, opened.spec.name)
    again = images.to_bytes(made)[0].permute(1, 2, 0).cpu().numpy()
    with Image.open(picture) as was:
        away = np.abs(again.astype(int) - np.asarray(was.convert("RGB")).astype(int))
    if away.any():
        raise ValueError(
            f"{picture}: {(away > 0).any(-1).mean():.1%} of the pixels are others now, by up to "
            f"{away.max()} of 255; it was made with {told.made_with} in {order.precision}, here is "
            f"{here(nearest())}"
        )
    return {"same": True, "seed": order.seed, "cascade": opened.digest}


def refuse_other_pictures(told: Told, given: Mapping[str, Path]) -> None:
    """Raises ValueError unless the given pictures are those that the PNG was made from."""
    for name in PICTURES:
        wanted, path = told.pictures.get(name), given.get(name)
        if wanted is not None and path is None:
            raise ValueError(f"it was made from a picture (sha256 {wanted[:12]}); give it: {OPTIONS[name]}")
        if path is not None and wanted is None:
            raise ValueError(f"it was made without {OPTIONS[name]}; leave that out")
        if path is not None and sealed.sha256(path) != wanted:
            raise ValueError(f"{path} is not what it was made from, whose sha256 is {wanted}; give that")
