"""Invented names of stations and cities: nobody remembers them from a real map, and no two fold to the same key."""

from __future__ import annotations

import re
import unicodedata

import numpy as np

LATIN_SCRIPTS = ("nordic", "danube", "iberian", "english", "cyrillic")
HAN_SCRIPTS = ("chinese", "bilingual")
"""Chinese names; "bilingual" maps write them in Latin letters too, as most Chinese maps do."""
SCRIPTS = (*LATIN_SCRIPTS, *HAN_SCRIPTS)

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

def _pairs(text: str) -> dict[str, str]:
    return dict(pair.split(":") for pair in text.split())


# Chinese beginnings and endings with their sound; every beginning has two characters.
_HAN_HEADS = _pairs(
    "云杉:Yunshan 青禾:Qinghe 霜桥:Shuangqiao 鹭洲:Luzhou 墨池:Mochi 砚山:Yanshan 槐序:Huaixu 岚溪:Lanxi 橘井:Jujing "
    "鹤汀:Heting 梧影:Wuying 琴湾:Qinwan 棠里:Tangli 泊舟:Bozhou 萤川:Yingchuan 荻港:Digang 雁屏:Yanping 苔石:Taishi "
    "藕塘:Outang 枫浦:Fengpu 麦垄:Mailong 星渡:Xingdu 竹坞:Zhuwu 沉香:Chenxiang 杏坡:Xingpo 蓼原:Liaoyuan 栖梧:Qiwu "
    "朔风:Shuofeng 银杉:Yinshan 晚渔:Wanyu 石榴:Shiliu 钟鼓:Zhonggu 芦荻:Ludi 瓷窑:Ciyao 锦帆:Jinfan 浣纱:Huansha "
    "听涛:Tingtao 拾翠:Shicui 镜湖:Jinghu 驼铃:Tuoling 梨雪:Lixue 桑榆:Sangyu 赤崖:Chiya 望舒:Wangshu 暮云:Muyun"
)
_HAN_TAILS = _pairs(
    "路:Lu 街:Jie 大道:Dadao 桥:Qiao 门:Men 公园:Gongyuan 广场:Guangchang 村:Cun 湖:Hu 山:Shan 东:Dong 西:Xi 南:Nan "
    "北:Bei 里:Li 港:Gang 渡口:Dukou 中心:Zhongxin 新城:Xincheng 学院:Xueyuan 体育场:Tiyuchang 老街:Laojie"
)


def romanised(name: str) -> str:
    """A Chinese name of ``make_names`` in Latin letters. Raises KeyError for any other name."""
    return f"{_HAN_HEADS[name[:2]]} {_HAN_TAILS[name[2:]]}" if name[2:] else _HAN_HEADS[name]


def city_name(name: str, script: str) -> str:
    """A city's name made from a station's: without what only a street or a quarter is called."""
    return name[:2] if script in HAN_SCRIPTS else name.split()[0]


def station_name(name: str, script: str) -> str:
    """The name as data sets give it: with "Station", or 站 where names are Chinese."""
    return f"{name}站" if script in HAN_SCRIPTS else f"{name} Station"


def fold(name: str) -> str:
    """The key by which two names count as equal: no case, diacritics, spaces, punctuation, "Station" or 站."""
    plain = unicodedata.normalize("NFKD", name.casefold().replace("station", "")).removesuffix("站")
    return re.sub(r"[^\w]", "", "".join(c for c in plain if not unicodedata.combining(c)))


def make_names(rng: np.random.Generator, count: int, script: str) -> list[str]:
    """``count`` invented names of one script whose keys differ from each other.

    Raises ValueError for an unknown script or more names than the script has.
    """
    if script in HAN_SCRIPTS:
        heads, tails = list(_HAN_HEADS), list(_HAN_TAILS)
        seconds: tuple[str, ...] = ()
    elif script in _PARTS:
        heads, tails, seconds = _PARTS[script][0].split(), _PARTS[script][1].split(), _PARTS[script][2]
    else:
        raise ValueError(f"unknown script {script!r}; known scripts: {', '.join(SCRIPTS)}")
    if count > len(heads) * len(tails):
        raise ValueError(f"script {script!r} has {len(heads) * len(tails)} names, {count} were asked for")
    seen: set[str] = set()
    names: list[str] = []
    while len(names) < count:
        name = heads[int(rng.integers(len(heads)))] + tails[int(rng.integers(len(tails)))]
        if seconds and rng.random() < 0.16:
            name += " " + seconds[int(rng.integers(len(seconds)))]
        if fold(name) not in seen:
            seen.add(fold(name))
            names.append(name)
    return names


def characters() -> str:
    """Every character that a name or its Latin form can hold, sorted: what a font must have."""
    latin = "".join(f"{heads}{tails}{''.join(seconds)}" for heads, tails, seconds in _PARTS.values())
    han = "".join(f"{text}{sound}" for parts in (_HAN_HEADS, _HAN_TAILS) for text, sound in parts.items())
    return "".join(sorted(set(latin + han + "站 ")))
