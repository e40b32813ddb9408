"""Prompts to vote on: ten in each of six categories in which models differ. Written for this project."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

PROMPTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "counting": (
            "three green apples on a wooden table",
            "two dogs and one cat on a sofa",
            "five hot air balloons above a valley",
            "a plate with four slices of lemon cake",
            "six candles burning in a row",
            "two bicycles leaning against a brick wall",
            "a nest with three speckled eggs",
            "four children on a see-saw",
            "seven sailing boats in a small harbour",
            "one pear between two oranges",
        ),
        "colours": (
            "a yellow bird on a purple fence",
            "a red teapot beside a white cup with a blue rim",
            "a woman in a green coat carrying an orange umbrella",
            "a pink car parked in front of a turquoise house",
            "a black horse with a white mane",
            "a blue rose in a brown glass bottle",
            "a man with a grey beard and red glasses",
            "purple carrots in a yellow bowl",
            "a green door in a pink wall",
            "a silver robot holding a golden key",
        ),
        "relations": (
            "a cat sleeping under a chair",
            "a lamp to the left of a bed",
            "a small box on top of a large box",
            "a boy sitting behind a drum",
            "a boat passing below a stone bridge",
            "a bear riding a bicycle through a park",
            "a spoon inside an empty jar",
            "a dog looking at its reflection in a puddle",
            "a ladder leaning against a tree, a basket at its foot",
            "a moon between two mountains",
        ),
        "hands and faces": (
            "portrait of an old fisherman, laughing",
            "two hands shaping clay on a potter's wheel",
            "close-up of a woman with freckles, soft daylight",
            "a violinist's left hand on the strings",
            "a girl covering one eye with her hand",
            "a baker holding a loaf of bread towards the viewer",
            "three friends smiling at the camera on a beach",
            "a man reading a letter with a frown",
            "a hand holding a small paper crane",
            "a nurse putting on blue gloves",
        ),
        "long sentences": (
            "in the early morning a street sweeper rests on his broom while the first tram turns into the empty square",
            "an old library with a spiral staircase, dust in the light of tall windows, and one open book on a desk in front",
            "a fox in a knitted scarf waits at a snowy bus stop beside a lantern, its footprints leading into the forest",
            "a kitchen at night seen from the garden, where a grandmother teaches two children to roll out dough",
            "a glass greenhouse on the roof of a tall building, full of ferns, with a thunderstorm over the distant city",
            "a small red tractor pulls a cart of pumpkins along a muddy lane while crows fly up from the field on its right",
            "an astronaut in white kneels on grey sand and waters a single sunflower under a black sky with a blue planet",
            "a crowded market in the rain, with wet umbrellas, baskets of fish and a boy holding a balloon in the middle",
            "a wooden desk with a half-finished letter, a fountain pen, a cup of tea and a cat's tail at the picture's edge",
            "a lighthouse keeper climbs the last steps, a lamp in one hand and a sandwich in the other, the sea wild below",
        ),
        "styles": (
            "a mountain village, watercolour with visible paper",
            "a steam train, woodcut in black and white",
            "portrait of a queen, oil painting of the Dutch golden age",
            "a lion, folded from paper, studio photograph",
            "a harbour at dusk, impressionist brushwork",
            "an owl, stained glass window",
            "a city of the future, pencil drawing by an architect",
            "a bowl of noodles, flat vector illustration",
            "a dancer, long exposure photograph with motion blur",
            "a castle in the clouds, pixel art",
        ),
    }
)


def shipped(categories: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The prompts of some categories, or of all; one of each in turn, so that a short test sees every kind."""
    chosen = [PROMPTS[name] for name in categories or PROMPTS]
    return tuple(prompt for row in zip(*chosen, strict=True) for prompt in row)
