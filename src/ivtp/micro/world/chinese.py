"""The micro world in Chinese: its words, and the questions that the multiple-choice formats ask in Chinese."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ivtp.micro.world.geometry import extreme_object, object_towards
from ivtp.micro.world.questions import count_to_ask, uniques
from ivtp.micro.world.scene import Scene, position_of
from ivtp.micro.world.vocabulary import (
    COLOURS,
    DIRECTIONS,
    EXTREMES,
    NAMES,
    POSITIONS,
    SIGN_TEXTS,
)

NAMES_ZH: dict[str, str] = {
    "dog": "狗",
    "cat": "猫",
    "rabbit": "兔子",
    "pig": "猪",
    "frog": "青蛙",
    "lion": "狮子",
    "panda": "熊猫",
    "monkey": "猴子",
    "penguin": "企鹅",
    "elephant": "大象",
    "horse": "马",
    "turtle": "乌龟",
    "snail": "蜗牛",
    "whale": "鲸鱼",
    "octopus": "章鱼",
    "butterfly": "蝴蝶",
    "apple": "苹果",
    "banana": "香蕉",
    "lemon": "柠檬",
    "strawberry": "草莓",
    "pineapple": "菠萝",
    "watermelon": "西瓜",
    "carrot": "胡萝卜",
    "mushroom": "蘑菇",
    "pizza": "披萨",
    "burger": "汉堡",
    "egg": "鸡蛋",
    "cake": "蛋糕",
    "donut": "甜甜圈",
    "car": "汽车",
    "bus": "公交车",
    "truck": "卡车",
    "tractor": "拖拉机",
    "bicycle": "自行车",
    "train": "火车",
    "airplane": "飞机",
    "helicopter": "直升机",
    "rocket": "火箭",
    "boat": "帆船",
    "tree": "树",
    "cactus": "仙人掌",
    "sunflower": "向日葵",
    "rose": "玫瑰",
    "house": "房子",
    "tent": "帐篷",
    "castle": "城堡",
    "star": "星星",
    "moon": "月亮",
    "ball": "足球",
    "guitar": "吉他",
    "drum": "鼓",
    "trumpet": "小号",
    "bell": "铃铛",
    "key": "钥匙",
    "clock": "闹钟",
    "lamp": "灯泡",
    "umbrella": "雨伞",
    "book": "书",
    "camera": "相机",
    "hat": "帽子",
    "crown": "皇冠",
    "heart": "爱心",
    "gift": "礼物",
    "robot": "机器人",
    "sign": "牌子",
}
COLOURS_ZH: dict[str, str] = {
    "red": "红色",
    "orange": "橙色",
    "yellow": "黄色",
    "green": "绿色",
    "blue": "蓝色",
    "purple": "紫色",
    "black": "黑色",
    "white": "白色",
}
POSITIONS_ZH: dict[str, str] = dict(
    zip(POSITIONS, ("左上", "上方", "右上", "左边", "中间", "右边", "左下", "下方", "右下"), strict=True)
)
DIRECTIONS_ZH: dict[str, str] = dict(zip(DIRECTIONS, ("左侧", "右侧", "上面", "下面"), strict=True))
EXTREMES_ZH: dict[str, str] = dict(zip(EXTREMES, ("最大", "最小", "最左边", "最右边", "最上面", "最下面"), strict=True))
_BACKINGS = {"disc": "圆盘", "frame": "方框"}
PHRASES_ZH: tuple[str, ...] = (
    *("图中", "有", "什么", "物体", "多少个", "几个", "在", "哪里", "的", "是", "颜色", "上", "写着", "后面"),
    *("周围", "下列", "哪一个", "出现", "位于", "哪个", "位置", "请", "直接", "回答", "选项", "字母", "。", "？"),
    *_BACKINGS.values(),
)
"""The rest of the words of the questions below; with the other tables, all that a tokenizer has to know."""


CHINESE_WORDS: tuple[str, ...] = tuple(
    dict.fromkeys(
        (
            *(*NAMES_ZH.values(), *COLOURS_ZH.values(), *POSITIONS_ZH.values(), *DIRECTIONS_ZH.values()),
            *(*EXTREMES_ZH.values(), *PHRASES_ZH),
        )
    )
)
CHINESE_PATTERN = "|".join(sorted(CHINESE_WORDS, key=len, reverse=True))
"""Regular expression of one word, the longest first: Chinese has no spaces, so tokenizers cut by this."""


@dataclass(frozen=True)
class ChoiceStem:
    """A question with its answer and the other words of the answer's kind, before options are drawn."""

    kind: str
    text: str
    answer: str
    others: tuple[str, ...]
    objects: tuple[int, ...]


def ask_chinese(scene: Scene, rng: random.Random) -> ChoiceStem | None:
    """A random question in Chinese with its answer; None if the drawn kind finds no clear one in the scene."""
    return rng.choice(_KINDS)(scene, rng)


def _rest(table: Sequence[str], answer: str) -> tuple[str, ...]:
    return tuple(word for word in table if word != answer)


def _unique(scene: Scene, rng: random.Random) -> list[int]:
    found = uniques(scene)
    return rng.sample(found, len(found))


def _shown(scene: Scene, rng: random.Random) -> ChoiceStem | None:
    name = rng.choice(scene.objects).name
    present = {item.name for item in scene.objects}
    text = rng.choice(("图中有什么物体？", "下列哪一个出现在图中？"))
    others = tuple(NAMES_ZH[n] for n in NAMES if n not in present)
    return ChoiceStem("choice", text, NAMES_ZH[name], others, _named(scene, name))


def _named(scene: Scene, name: str) -> tuple[int, ...]:
    return tuple(i for i, item in enumerate(scene.objects) if item.name == name)


def _colour(scene: Scene, rng: random.Random) -> ChoiceStem | None:
    for index in _unique(scene, rng):
        item = scene.objects[index]
        if item.colour is not None:
            where = "后面" if item.backing == "disc" else "周围"
            text = f"{NAMES_ZH[item.name]}{where}的{_BACKINGS[item.backing]}是什么颜色？"
            answer = COLOURS_ZH[item.colour]
            return ChoiceStem("colour", text, answer, _rest([COLOURS_ZH[c] for c in COLOURS], answer), (index,))
    return None


def _count(scene: Scene, rng: random.Random) -> ChoiceStem | None:
    counts = Counter(item.name for item in scene.objects)
    number = count_to_ask(sorted(set(counts.values())), rng)
    name = rng.choice(sorted(name for name, count in counts.items() if count == number))
    objects = _named(scene, name)
    text = rng.choice((f"图中有多少个{NAMES_ZH[name]}？", f"图中有几个{NAMES_ZH[name]}？"))
    answer = str(len(objects))
    return ChoiceStem("count", text, answer, _rest([str(n) for n in range(7)], answer), objects)


def _position(scene: Scene, rng: random.Random) -> ChoiceStem | None:
    for index in _unique(scene, rng):
        word = position_of(scene.objects[index].box, 14.0)
        if word is not None:
            name = NAMES_ZH[scene.objects[index].name]
            text = rng.choice((f"{name}在图中的哪里？", f"{name}位于图中哪个位置？"))
            answer = POSITIONS_ZH[word]
            return ChoiceStem("position", text, answer, _rest(list(POSITIONS_ZH.values()), answer), (index,))
    return None


def _neighbour(scene: Scene, rng: random.Random) -> ChoiceStem | None:
    for index in _unique(scene, rng):
        way = rng.choice(DIRECTIONS)
        other = object_towards(scene, index, way)
        if other is not None:
            text = f"{NAMES_ZH[scene.objects[index].name]}{DIRECTIONS_ZH[way]}是什么？"
            return _object_stem("neighbour", text, scene, other, (index, other))
    return None


def _extreme(scene: Scene, rng: random.Random) -> ChoiceStem | None:
    word = rng.choice(EXTREMES)
    index = extreme_object(scene, word)
    if index is None:
        return None
    return _object_stem("extreme", f"{EXTREMES_ZH[word]}的物体是什么？", scene, index, (index,))


def _object_stem(kind: str, text: str, scene: Scene, index: int, objects: tuple[int, ...]) -> ChoiceStem:
    answer = NAMES_ZH[scene.objects[index].name]
    return ChoiceStem(kind, text, answer, _rest(list(NAMES_ZH.values()), answer), objects)


def _sign(scene: Scene, rng: random.Random) -> ChoiceStem | None:
    signs = [i for i, item in enumerate(scene.objects) if item.text is not None]
    if len(signs) != 1:
        return None
    answer = scene.objects[signs[0]].text or ""
    return ChoiceStem("sign", "牌子上写着什么？", answer, _rest(SIGN_TEXTS, answer), (signs[0],))


_KINDS: tuple[Callable[[Scene, random.Random], ChoiceStem | None], ...] = (
    *(_shown, _colour, _count, _position, _neighbour, _extreme, _sign),
)
