"""A published network as it came: not trained here, and no link of a cascade until a stage takes it over."""

from typing import Literal

from dd_core.layouts.published import Process
from dd_core.nets.network import DenoiserSpec
from dd_core.spec import Spec


class NetworkSpec(Spec):
    """What it is, by whom it was published, and how it was trained to be asked."""

    kind: Literal["network"] = "network"
    source: str
    """As declared when it was imported; a name of `layouts.published`, or diffusers."""
    net: DenoiserSpec
    process: Process | None = None
    """None: its source does not say."""
