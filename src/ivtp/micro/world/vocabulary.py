"""The words of the micro world: objects, colours, signs, positions, and how they are put into English."""

from __future__ import annotations

OBJECTS: dict[str, tuple[str, int]] = {
    # name: (category, Unicode code point of the glyph)
    "dog": ("animal", 0x1F436),
    "cat": ("animal", 0x1F431),
    "rabbit": ("animal", 0x1F430),
    "pig": ("animal", 0x1F437),
    "frog": ("animal", 0x1F438),
    "lion": ("animal", 0x1F981),
    "panda": ("animal", 0x1F43C),
    "monkey": ("animal", 0x1F435),
    "penguin": ("animal", 0x1F427),
    "elephant": ("animal", 0x1F418),
    "horse": ("animal", 0x1F40E),
    "turtle": ("animal", 0x1F422),
    "snail": ("animal", 0x1F40C),
    "whale": ("animal", 0x1F433),
    "octopus": ("animal", 0x1F419),
    "butterfly": ("animal", 0x1F98B),
    "apple": ("food", 0x1F34E),
    "banana": ("food", 0x1F34C),
    "lemon": ("food", 0x1F34B),
    "strawberry": ("food", 0x1F353),
    "pineapple": ("food", 0x1F34D),
    "watermelon": ("food", 0x1F349),
    "carrot": ("food", 0x1F955),
    "mushroom": ("food", 0x1F344),
    "pizza": ("food", 0x1F355),
    "burger": ("food", 0x1F354),
    "egg": ("food", 0x1F95A),
    "cake": ("food", 0x1F382),
    "donut": ("food", 0x1F369),
    "car": ("vehicle", 0x1F697),
    "bus": ("vehicle", 0x1F68C),
    "truck": ("vehicle", 0x1F69A),
    "tractor": ("vehicle", 0x1F69C),
    "bicycle": ("vehicle", 0x1F6B2),
    "train": ("vehicle", 0x1F682),
    "airplane": ("vehicle", 0x2708),
    "helicopter": ("vehicle", 0x1F681),
    "rocket": ("vehicle", 0x1F680),
    "boat": ("vehicle", 0x26F5),
    "tree": ("place", 0x1F333),
    "cactus": ("place", 0x1F335),
    "sunflower": ("place", 0x1F33B),
    "rose": ("place", 0x1F339),
    "house": ("place", 0x1F3E0),
    "tent": ("place", 0x26FA),
    "castle": ("place", 0x1F3F0),
    "star": ("place", 0x2B50),
    "moon": ("place", 0x1F319),
    "ball": ("thing", 0x26BD),
    "guitar": ("thing", 0x1F3B8),
    "drum": ("thing", 0x1F941),
    "trumpet": ("thing", 0x1F3BA),
    "bell": ("thing", 0x1F514),
    "key": ("thing", 0x1F511),
    "clock": ("thing", 0x23F0),
    "lamp": ("thing", 0x1F4A1),
    "umbrella": ("thing", 0x2602),
    "book": ("thing", 0x1F4D5),
    "camera": ("thing", 0x1F4F7),
    "hat": ("thing", 0x1F3A9),
    "crown": ("thing", 0x1F451),
    "heart": ("thing", 0x2764),
    "gift": ("thing", 0x1F381),
    "robot": ("thing", 0x1F916),
}
GLYPHS: tuple[str, ...] = tuple(OBJECTS)
NAMES: tuple[str, ...] = (*GLYPHS, "sign")

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 30, 36),
    "orange": (250, 138, 20),
    "yellow": (250, 226, 40),
    "green": (34, 150, 60),
    "blue": (36, 84, 214),
    "purple": (138, 48, 170),
    "black": (20, 20, 22),
    "white": (252, 252, 252),
}

WORDS: tuple[str, ...] = (
    *("stop", "go", "open", "exit", "sale", "hotel", "cafe", "park", "zoo", "bank", "taxi", "shop"),
    *("food", "help", "north", "south", "push", "pull", "free", "milk", "gold", "wifi", "menu", "slow"),
)
NUMBERS: tuple[str, ...] = ("5", "7", "12", "19", "24", "30", "46", "58", "63", "80", "99", "100")
SIGN_TEXTS: tuple[str, ...] = WORDS + NUMBERS

DIRECTIONS: tuple[str, ...] = ("left", "right", "above", "below")
POSITIONS: tuple[str, ...] = (
    *("top left", "top", "top right"),
    *("left", "center", "right"),
    *("bottom left", "bottom", "bottom right"),
)
EXTREMES: tuple[str, ...] = ("largest", "smallest", "leftmost", "rightmost", "topmost", "bottommost")
LETTERS: tuple[str, ...] = ("a", "b", "c", "d")
BACKGROUNDS: tuple[str, ...] = ("plain", "gradient", "noise", "stripes", "texture")

_IRREGULAR = {
    "bus": "buses",
    "octopus": "octopuses",
    "cactus": "cactuses",
    "butterfly": "butterflies",
    "strawberry": "strawberries",
}


def plural(name: str) -> str:
    """The plural of an object's name."""
    return _IRREGULAR.get(name, name + "s")


def article(phrase: str) -> str:
    """The phrase with its indefinite article: ``an apple``."""
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def listing(items: list[str]) -> str:
    """Items joined as in a sentence: ``a, b and c``."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]
