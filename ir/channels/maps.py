"""Maps of channels: what is asked for, and which maps ask alike."""

from enum import Enum


class Map(Enum):
    """What may be done to the channels of a group without a change of the function.

    PERMUTE reorders them, SELECT drops some (where a value has an axis of heads, whole heads), SCALE multiplies each by a positive number,
    ROTATE mixes them by an orthogonal matrix, LINEAR by any invertible one. CENTER subtracts their mean.
    """

    SELECT = "select"
    PERMUTE = "permute"
    SCALE = "scale"
    ROTATE = "rotate"
    LINEAR = "linear"
    CENTER = "center"


INVERTED = (Map.SCALE, Map.LINEAR)  # maps whose inverse transpose is another map
MIXING = (Map.PERMUTE, Map.ROTATE, Map.LINEAR, Map.CENTER)  # maps of whole blocks of channels
ELEMENTWISE = (Map.SELECT, Map.PERMUTE)  # maps that commute with any function of single elements
