"""Record and Recording: what capture() gives. Next hop: pictures.py draws them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from .core.call import Call

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Record(dict[str, Any]):
    """The statistics of one attention call, by the names that capture() was given. They are also
    attributes, where "pooled:32" is pooled.

    name: the path of the module that called, from the outermost module that was called (or
        capture()'s model); "": that module itself, or a call outside of any module.
    layer: the first number in the path; None where it has none.
    call: the call itself, with capture(inputs=True); else None.
    """

    def __init__(self, name: str, call: Call | None = None, **stats: Any) -> None:
        super().__init__(stats)
        number = re.search(r"(?:^|\.)(\d+)(?=\.|$)", name)
        self.name, self.call = name, call
        self.layer = int(number[1]) if number else None

    def __missing__(self, name: str) -> Any:
        for full, x in self.items():
            if full.partition(":")[0] == name:
                return x
        raise KeyError(f"this record has no {name!r}; it has {', '.join(self) or 'no statistics'}")

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(error.args[0]) from None

    def __repr__(self) -> str:
        shapes = "".join(f", {name} {_shape(x)}" for name, x in self.items())
        return f"Record({shown(self.name)}, layer {self.layer}{shapes})"


def _shape(x: Any) -> list[int]:
    return list(x[0].shape if isinstance(x, tuple) else x.shape)


class Recording(list[Record]):
    """The records of a capture(), one for each call, in the order of the calls."""

    def __repr__(self) -> str:
        lines = [f"{len(self)} attention calls"]
        lines += (f"  {n}  {record}" for n, record in enumerate(self))
        return "\n".join(lines)

    def plot(self, path: Any = None) -> Figure:
        """Draws what was recorded with matplotlib: statistics of rows by depth, and maps by layer
        and head. path: also writes the figure there, in the format of the file's ending."""
        from .pictures import figure

        return figure(self, path)

    def _repr_html_(self) -> str:
        from .pictures import fragment

        return fragment(self)


def shown(name: str) -> str:
    return name or "(model)"
