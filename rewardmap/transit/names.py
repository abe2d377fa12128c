"""Invented names of stations and cities: nobody remembers them from a real map, and no two fold to the same key."""

from __future__ import annotations

import re
import unicodedata

import numpy as np

SCRIPTS = ("nordic", "danube", "iberian", "english", "cyrillic")

# Beginnings, endings and second words; a name is beginning + ending, now and then with a second word.
_PARTS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "nordic": (
        "Brønn Tås Kjel Sø Lille Ås Grå Hauk Skog Ny Sval Tør Ulv Vær Bjørk Fager Gås Høl "
        "Stor Eng Rød Myr Lind Hal Fjell Gran",
        "vik stad haug dal mark nes borg holt åsen lund vann sletta elva by gård heim rud moen",
        ("torg", "øst", "vest", "havn", "sentrum", "bru"),
    ),
    "danube": (
        "Szó Vár Kő Ör Bükk Nagy Kis Fűz Hár Tölgy Gyön Žel Bře Čer Lip Dub Můl Šar Ráb Jel Tisz Koz Hol Ébr Mez Zöld",
        "hely falva liget mező kút vice nov ník hora udvar vár erdő patak laky řany szeg tő csány",
        ("tér", "utca", "híd", "náměstí", "kapu", "liget"),
    ),
    "iberian": (
        "Al Bra Cor Vila Mon Sei Fon São Pe Gua Ler Mira Oli Ran Sal Tor Var Zam Que Lou Cal Ber Pal Nur Ara Vei",
        "queira mões gança dela vão tejo nheira rido calde çal bique lares redo nção jal vedra",
        ("Norte", "Sul", "Velha", "Nova", "do Mar", "da Luz"),
    ),
    "english": (
        "Ash Brack Cold Dun Elm Fern Gold Harrow Kings Lark Mal Nether Oak Pem Quarry Rush "
        "Stone Thorn Up Wes Hazel Brox Ald Cran Hart Ivy",
        "ford wick combe ley bury den gate minster worth holme mere field brook cliff stead hythe ham ton",
        ("Park", "Cross", "Green", "Wharf", "Hill", "Street"),
    ),
    "cyrillic": (
        "Бере Вол Гор Дуб Зеле Кали Лес Мая Ново Озер Пол Реч Сос Тих Фон Черё Яс Крас Луг "
        "Син Бел Верх Заре Кам Мед Нов Рябин",
        "зовка жинск ковая нево рино стань тино хово бор мост озёрск гай дольск ная шино вежье",
        ("Парк", "Роща", "Набережная", "Вокзал", "Площадь"),
    ),
}


def fold(name: str) -> str:
    """The key by which two names count as equal: no case, diacritics, spaces, punctuation or "Station"."""
    plain = unicodedata.normalize("NFKD", name.casefold().replace("station", ""))
    return re.sub(r"[^\w]", "", "".join(c for c in plain if not unicodedata.combining(c)))


def make_names(rng: np.random.Generator, count: int, script: str) -> list[str]:
    """``count`` invented names of one script whose keys differ from each other.

    Raises ValueError for an unknown script or more names than the script has.
    """
    if script not in _PARTS:
        raise ValueError(f"unknown script {script!r}; known scripts: {', '.join(SCRIPTS)}")
    heads, tails, seconds = _PARTS[script][0].split(), _PARTS[script][1].split(), _PARTS[script][2]
    if count > len(heads) * len(tails):
        raise ValueError(f"script {script!r} has {len(heads) * len(tails)} names, {count} were asked for")
    seen: set[str] = set()
    names: list[str] = []
    while len(names) < count:
        name = heads[int(rng.integers(len(heads)))] + tails[int(rng.integers(len(tails)))]
        if rng.random() < 0.16:
            name += " " + seconds[int(rng.integers(len(seconds)))]
        if fold(name) not in seen:
            seen.add(fold(name))
            names.append(name)
    return names
