"""Constants of a device, for estimates that compare one program with another.

They are published ones of an Ascend 910B3, and assumptions where nothing is published; nothing was measured on a card.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """Constants of a device. Microseconds, bytes a microsecond, operations a microsecond.

    Attributes:
        memory: device memory bandwidth. `matrix`: half-precision multiply-adds count as two. `link`: one direction.
        launch: from one kernel of a captured graph to the next on a stream (assumption).
        event: recording or awaiting an event in a captured graph (assumption).
        share: bytes that one vector core works on before a second one helps (assumption), of `cores` cores.
    """

    name: str = "910B3"
    memory: float = 1.15e6
    matrix: float = 295e6
    link: float = 25e3
    launch: float = 1.5
    event: float = 1.0
    share: int = 16 << 10
    cores: int = 40
