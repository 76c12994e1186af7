"""A picture of a step as MLflow's pages show it, under a name that is the same whenever it is sent.

`MlflowClient.log_image(key=..., step=...)` gives each file a random name, so that a picture which is sent
twice is shown twice.  The pages find pictures by their names (mlflow/tracking/client.py, log_image):

    images/<key>+step+<step>+timestamp+<ms>+<uuid>.png              as it is; `/` in a key is `~`
    images/<key>+step+<step>+timestamp+<ms>+<uuid>+compressed.webp  as the pages show it first
"""

import uuid
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from workflows.journal import Entry

SHOWN_PIXELS = 256
"""The longer side of the small picture."""
HAS_IMAGES = "mlflow.loggedImages"
"""The tag of a run by which its page knows that it has pictures."""


def log_picture(client: Any, run_id: str, entry: Entry, path: Path) -> None:
    """Send a picture and a small copy of it; both replace those of an earlier call with the same entry.

    Args:
        client: An MlflowClient.
        run_id: Of the run that gets it.
        entry: The line of the journal, which names it.
        path: Of the file that the line refers to.
    """
    line = uuid.uuid5(uuid.NAMESPACE_OID, repr(entry))
    key = entry.name.replace("/", "~")
    name = f"images/{key}+step+{entry.step}+timestamp+{entry.at_ms}+{line}"
    with Image.open(path) as image:
        client.log_image(run_id, image, f"{name}.png", synchronous=True)
        small = ImageOps.contain(image, (SHOWN_PIXELS, SHOWN_PIXELS))
    client.log_image(run_id, small, f"{name}+compressed.webp", synchronous=True)
    client.set_tag(run_id, HAS_IMAGES, "True")
