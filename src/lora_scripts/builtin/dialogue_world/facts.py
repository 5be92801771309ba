"""What is true in the shop of the dialogues: 40 products, the shop itself, its opening hours and sixteen orders.

All of it is fixed, so that a small model can know it by heart and an answer is either right or wrong.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["COLOURS", "HOURS", "MATERIALS", "NEVER_SOLD", "ORDERS", "PRODUCTS", "SHOP", "Order", "Product"]

COLOURS = ("black", "blue", "brown", "green", "grey", "orange", "pink", "purple", "red", "white", "yellow")
MATERIALS = ("clay", "cotton", "glass", "leather", "metal", "paper", "plastic", "stone", "wood", "wool")


@dataclass(frozen=True)
class Product:
    """A thing the shop sells.

    Attributes:
        price: dollars.
        size: centimetres, of its longest side.
        stock: pieces on hand; 0 is sold out.
        delivery: days.
        shelf: letter and number, such as "B4".
    """

    name: str
    price: int
    colour: str
    material: str
    size: int
    stock: int
    delivery: int
    shelf: str


@dataclass(frozen=True)
class Order:
    """An order: what was bought, how far it is, and the day on which it arrives."""

    number: str
    product: str
    status: str
    day: str


_TABLE = """
lamp      24 blue   metal   35 12 2 B4
kettle    31 red    metal   28  7 3 A2
teapot    27 white  clay    22  4 4 A3
mug        8 green  clay    11 36 2 A5
bowl      14 brown  wood    26 18 3 A6
plate      9 white  clay    24 42 2 A7
vase      38 purple glass   41  3 5 C1
candle     6 yellow paper   15 50 1 C2
mirror    72 grey   glass   80  2 7 D1
clock     45 black  wood    32  6 4 D2
chair     89 brown  wood    95  5 8 E1
stool     47 orange plastic 48  9 6 E2
table     96 black  metal   99  1 9 E3
rug       65 red    wool    90  0 6 F1
blanket   42 grey   wool    85 14 3 F2
pillow    19 pink   cotton  50 23 2 F3
curtain   34 green  cotton  88  8 4 F4
basket    21 brown  paper   37 11 3 C3
box       12 yellow paper   30 29 2 C4
bag       33 black  leather 45 10 3 G1
backpack  58 blue   cotton  52  6 4 G2
wallet    29 brown  leather 12 17 2 G3
belt      26 black  leather 98 13 2 G4
scarf     23 purple wool    75 20 2 H1
hat       18 grey   wool    27 15 2 H2
umbrella  22 orange plastic 67 16 3 H3
jacket    84 green  leather 70  0 5 H4
shirt     28 white  cotton  62 24 3 H5
sweater   54 red    wool    64  9 4 H6
notebook   5 blue   paper   21 60 1 B1
pen        3 red    plastic 14 75 1 B2
puzzle    16 pink   wood    40 19 2 B6
drum      63 orange wood    38  3 7 D4
guitar    94 yellow wood    92  2 8 D5
kite      17 purple cotton  73  0 3 D6
ball      11 orange leather 25 27 2 D7
tent      78 green  cotton  97  4 6 E5
lantern   36 black  glass   29  8 3 B7
bucket    13 grey   metal   33 21 2 E6
statue    68 white  stone   44  1 9 D9
"""


def _product(row: str) -> Product:
    name, price, colour, material, size, stock, delivery, shelf = row.split()
    return Product(name, int(price), colour, material, int(size), int(stock), int(delivery), shelf)


PRODUCTS: dict[str, Product] = {p.name: p for p in map(_product, _TABLE.strip().splitlines())}

NEVER_SOLD = (
    *("car", "boat", "phone", "camera", "bicycle", "piano", "fridge", "oven", "carpet", "printer", "tyre", "sofa"),
    *("bed", "door", "engine", "fish tank", "flute", "desk", "horse", "bridge", "radio", "tractor", "violin", "cake"),
)
"""Things that customers ask for in vain."""

SHOP: dict[str, str] = {
    "name": "Maple Corner",
    "street": "12 Mill Street",
    "town": "Ashford",
    "phone": "555 0147",
    "owner": "Rosa",
    "returns": "30 days",
    "wrapping": "2 dollars",
    "parking": "behind the shop",
    "payment": "cash or card",
    "postage": "4 dollars",
    "free postage": "60 dollars",
    "founded": "1998",
    "dogs": "welcome",
    "repairs": "Tuesday",
    "guarantee": "3 years",
    "sale": "January",
}
"""Topic -> the words that a right answer must hold."""

HOURS: dict[str, tuple[int, int] | None] = {
    "Monday": (9, 17),
    "Tuesday": (9, 18),
    "Wednesday": (10, 18),
    "Thursday": (8, 20),
    "Friday": (9, 21),
    "Saturday": (10, 16),
    "Sunday": None,
}
"""Opening and closing hour of each day, None where the shop stays closed."""

_ORDERS = """
204 lamp     packed       Friday
217 kettle   shipped      Monday
231 vase     delayed      Thursday
246 chair    cancelled    Sunday
258 rug      paid         Tuesday
263 bag      delivered    Wednesday
279 scarf    shipped      Saturday
285 guitar   packed       Tuesday
312 tent     delayed      Monday
328 mirror   delivered    Friday
334 pillow   paid         Thursday
347 clock    shipped      Wednesday
351 jacket   cancelled    Saturday
369 teapot   packed       Sunday
376 drum     delivered    Monday
390 sweater  delayed      Friday
"""

ORDERS: dict[str, Order] = {row.split()[0]: Order(*row.split()) for row in _ORDERS.strip().splitlines()}
