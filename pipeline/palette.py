"""One colour per tissue class, the same in heat maps, GeoJSON and the report."""

from collections.abc import Sequence

Colour = tuple[int, int, int]

# Severity from cold to warm, told apart by colour-blind readers too (Okabe & Ito 2008).
_GLEASON: dict[str, Colour] = {
    "background": (150, 150, 150),
    "healthy": (0, 158, 115),
    "gleason3": (240, 228, 66),
    "gleason4": (230, 120, 0),
    "gleason5": (190, 20, 20),
}
_OTHERS: tuple[Colour, ...] = (
    (0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233), (213, 94, 0), (240, 228, 66),
    (120, 94, 240),
)  # fmt: skip


def class_colours(names: Sequence[str]) -> tuple[Colour, ...]:
    """An RGB colour (0 to 255) for each class; Gleason classes have their own, others take turns.

    >>> class_colours(["healthy", "gleason5"])
    ((0, 158, 115), (190, 20, 20))
    """
    return tuple(_GLEASON.get(name, _OTHERS[number % len(_OTHERS)]) for number, name in enumerate(names))
