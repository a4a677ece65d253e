"""Words for keys and lists."""

from __future__ import annotations

import random

_ADJECTIVES = """
able amber ancient arctic brave brief bright broad bronze calm careful cheap clean clever cold coral curious deep
distant eager early empty famous fierce formal fresh gentle giant golden grand green happy heavy hollow honest humble
idle jolly keen kind large late lively lonely loud lucky mellow mild modern narrow noble odd pale patient plain polite
proud quick quiet rapid rare rough royal rusty secret sharp shiny silent simple slim smooth solid steady strange sweet
tall tender thin tidy tiny vast vivid warm wild wise young
"""
_NOUNS = """
acorn actor anchor ankle apple arrow autumn badge bakery balcony banana barrel basket beach bench berry bicycle
biscuit blanket blossom bottle branch bread bridge broom brush bucket button cabin cable camera candle canoe carpet
castle cellar chair cherry chimney circle clock cloud coffee collar comet copper corner cotton cousin crayon cricket
crown curtain daisy desert dinner doctor dolphin donkey dragon drawer eagle engine envelope falcon farmer feather
fence ferry fiddle finger flag flute forest fountain fox garden garlic gate ginger glacier glove grape guitar hammer
harbor hat hedge helmet hill honey horse hotel island jacket jewel jungle kettle key kitchen kite ladder lake lantern
lawyer leaf lemon letter library lily lion lizard magnet maple market marble meadow melon mirror mitten monkey moon
mountain museum mushroom napkin needle nest nurse oak oasis ocean olive onion orange orchard otter oven owl oyster
paddle painter palace panda paper parrot pasture peach pebble pencil pepper piano pillow pilot pine pirate planet plum
pocket poet pond potato prince pumpkin puzzle quilt rabbit radio raft rain raven ribbon rice ring river robin rocket
rope rose saddle sailor salad salmon sand scarf school scissors shadow sheep shell shirt shoe silver singer sister
skirt sled snail soap sofa soldier spider spoon spring squirrel stable star station stone storm stove straw summer
swan table tailor teacher temple tent thimble thunder tiger tinsel toast tomato tower train tree trumpet tulip tunnel
turtle uncle valley vase velvet village vine violin wagon walnut walrus water whale wheat wheel whistle willow window
winter wizard wolf wool yard zebra
"""
ADJECTIVES, NOUNS = tuple(_ADJECTIVES.split()), tuple(_NOUNS.split())


def keys(rng: random.Random, count: int) -> list[str]:
    """Different names of the form adjective-noun, no adjective or noun twice while there are enough."""
    adjectives, nouns = rng.sample(ADJECTIVES, len(ADJECTIVES)), rng.sample(NOUNS, len(NOUNS))
    return [f"{adjectives[i % len(adjectives)]}-{nouns[i % len(nouns)]}" for i in range(count)]


def numbers(rng: random.Random, count: int, digits: int = 7) -> list[str]:
    """Different numbers of `digits` digits."""
    return [str(number) for number in rng.sample(range(10 ** (digits - 1), 10**digits), count)]
