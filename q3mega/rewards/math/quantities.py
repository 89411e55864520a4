r"""Numbers and their units, as `notation.normal` writes them: exact values, nothing evaluated."""

import re
from collections import Counter
from fractions import Fraction

from q3mega.rewards.math.notation import CJK, MAX_CHARACTERS, normal, words

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.[0-9]+)?|\.[0-9]+)"
_REPEATING = re.compile(r"([0-9]*)\.([0-9]*)\\overline\{([0-9]+)\}")
_MIXED = re.compile(r"([0-9]+)(?:\\frac\{([0-9]+)\}\{([0-9]+)\}| ([0-9]+)/([0-9]+))")
_RATIO = re.compile(rf"({_DECIMAL})/([-+]?{_DECIMAL})")
_FRACTION = re.compile(rf"\\frac\{{([-+]?{_DECIMAL})\}}\{{([-+]?{_DECIMAL})\}}")
_POWER_OF_TEN = re.compile(
    r"([1-9](?:\.[0-9]+)?)(?:[eE]([-+]?[0-9]{1,3})"
    r"|(?:\\times|\\cdot|\*)10\^(?:([0-9])|\{([-+]?[0-9]{1,3})\}))"
)
_PLAIN = re.compile(_DECIMAL)
_VALUE = re.compile(
    "|".join(
        f"(?:{p.pattern})" for p in (_REPEATING, _MIXED, _POWER_OF_TEN, _RATIO, _FRACTION, _PLAIN)
    )
)

# Each unit with its other names. Counters of one kind of thing are one.
_UNITS = {
    "nm": "nanometer nanometre 纳米", "um": r"\mum micrometer micrometre 微米",
    "mm": "millimeter millimetre 毫米 ミリメートル", "dm": "decimeter decimetre 分米",
    "cm": "centimeter centimetre 厘米 公分 センチ センチメートル",
    "m": "meter metre 米 公尺 メートル", "km": "kilometer kilometre 千米 公里 キロメートル キロ",
    "in": "inch inches 英寸 インチ", "ft": "foot feet 英尺 フィート", "yd": "yard 码",
    "mi": "mile 英里 マイル", "里": "", "mg": "milligram 毫克", "g": "gram 克 グラム",
    "kg": "kilogram kilo 千克 公斤 キログラム", "斤": "", "t": "ton tonne 吨 噸 トン",
    "lb": "pound 磅 ポンド", "oz": "ounce 盎司", "mL": "ml milliliter millilitre 毫升 ミリリットル",
    "L": "l liter litre 升 公升 リットル", "gal": "gallon 加仑", "ha": "hectare 公顷 ヘクタール",
    "亩": "", "acre": "英亩", "ns": "nanosecond", "us": r"\mus microsecond 微秒",
    "ms": "millisecond 毫秒", "s": "sec second 秒 秒钟 秒間", "min": "minute 分钟 分鐘 分間",
    "h": "hr hour 小时 小時 时间 時間 钟头", "day": "天 日 日間 日间", "week": "周 星期 週間",
    "month": "月 个月 個月 ヶ月 か月 ケ月", "year": "年 年間", "岁": "歳 周岁", "mph": "",
    "kph": "", "rpm": "", "N": "newton 牛 牛顿 ニュートン", "kN": "", "J": "joule 焦 焦耳 ジュール",
    "kJ": "千焦", "MJ": "", "eV": "", "keV": "", "MeV": "", "GeV": "", "cal": "calorie 卡 カロリー",
    "kcal": "千卡 大卡", "W": "watt 瓦 瓦特 ワット", "kW": "千瓦", "MW": "", "kWh": "度电 千瓦时",
    "V": "volt 伏 伏特 ボルト", "kV": "", "mV": "", "A": "ampere amp 安 安培 アンペア",
    "mA": "毫安", "C": "coulomb 库仑", "T": "tesla 特斯拉", "F": "farad 法拉", "Wb": "weber 韦伯",
    r"\Omega": "ohm 欧姆 欧 オーム", "Hz": "hertz 赫兹 ヘルツ", "kHz": "", "MHz": "", "GHz": "",
    "Pa": "pascal 帕 帕斯卡 パスカル", "kPa": "千帕", "MPa": "", "atm": "", "K": "kelvin 开尔文",
    "mol": "mole 摩尔 モル", "dB": "decibel 分贝", "unit": "单位 單位",
    "rad": "radian 弧度 ラジアン", r"^\circ": "degree deg 度", r"^\circC": "摄氏度 攝氏度",
    r"^\circF": "华氏度", "%": "percent pct percentage パーセント", "bit": "比特 ビット",
    "byte": "字节 バイト", "kB": "KB", "MB": "", "GB": "", "TB": "",
    "$": "dollar USD US$ 美元 ドル", "cent": "¢ 美分", "€": "euro EUR 欧元 ユーロ", "£": "GBP 英镑",
    "₩": "won KRW 원", "₹": "rupee INR", "yuan": "RMB CNY 元 圆 块 块钱 人民币", "角": "毛",
    "yen": "JPY 円 日元 日圆", "¥": "", "分": "", "point": "pt points 点 點",
    "个": "個 つ コ こ ヶ 개", "人": "名 位 명 口人", "次": "回 遍 趟", "本": "册 冊 卷 巻",
    "只": "隻 匹 頭 头 羽", "张": "張 枚 幅", "台": "辆 輛 架", "件": "套", "条": "條",
    "根": "支 枝 株 棵", "颗": "粒 顆 滴", "种": "種 种类 種類 通り", "组": "組 对 対 對", "倍": "",
    "步": "歩", "页": "頁 ページ", "行": "", "段": "", "层": "階 層 楼", "题": "道 题 問",
    "箱": "盒", "袋": "包", "杯": "瓶 碗",
}  # fmt: skip
_UNIT = {alias: unit for unit, more in _UNITS.items() for alias in (unit, *more.split())}
_COUNTERS = {*"个人次本只张台件条根颗种组页行段层题箱袋杯步"}
# Names of more than one unit.
_MEANINGS = {
    "¥": {"¥", "yuan", "yen"},
    "分": {"分", "min", "point"},
}
_EAST = sorted((alias for alias in _UNIT if re.match(f"[{CJK}]", alias)), key=len, reverse=True)
_TOKEN = re.compile(
    rf"\^\\circ[CF]?|\^(?:-?[0-9]|\{{-?[0-9]\}})|平方|立方|每|毎|{'|'.join(_EAST)}|[{CJK}]+"
    r"|\\Omega|\\mu ?(?:m|s)\b|US\$|[A-Za-z]+|[%$€£¥¢₩₹/()]"
)
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "squared": 2, "cubed": 3, "平方": 2, "立方": 3}
_CURRENCY = re.compile(r"US\$|[$€£¥₩₹]|(?:RMB|CNY|USD|EUR|GBP|JPY|人民币|\\text\{(?:RMB|USD)\}) ?")


def number(text: str) -> Fraction | None:
    r"""The value of '-1,200.5', '1/2', '\frac{1}{2}', '1\frac12', '0.\overline{3}', '1.2e3' and
    '1.2\times10^{3}'; None for anything else, a sum or a power among it: those are work left over.
    """
    if len(text) > MAX_CHARACTERS:
        return None
    return value_of(normal(text))


def value_of(text: str) -> Fraction | None:
    """The same of a text that is in its normal form already."""
    sign = -1 if text.startswith("-") else 1
    value = _unsigned(text[1:] if text[:1] in ("-", "+") else text)
    return None if value is None else sign * value


def _unsigned(text: str) -> Fraction | None:
    if len(text) > 2 * MAX_CHARACTERS:  # more digits than an answer may have
        return None
    if _PLAIN.fullmatch(text):
        return Fraction(text.replace(",", ""))
    if match := _RATIO.fullmatch(text) or _FRACTION.fullmatch(text):
        above, below = (Fraction(part.replace(",", "")) for part in match.groups())
        return above / below if below else None
    if match := _POWER_OF_TEN.fullmatch(text):
        mantissa, *exponents = match.groups()
        return Fraction(mantissa) * Fraction(10) ** int(next(filter(None, exponents)))
    if match := _MIXED.fullmatch(text):
        integer, above, below = (Fraction(part) for part in match.groups() if part)
        return integer + above / below if above < below else None
    if match := _REPEATING.fullmatch(text):
        integer_digits, fixed, period = match.groups()
        parts = Fraction(int(period), 10 ** len(period) - 1) + int(fixed or 0)
        return int(integer_digits or 0) + parts / 10 ** len(fixed)
    return None


def unit(text: str, *, noun: bool, letter: str = "") -> str | None:
    r"""The canonical name of a unit, 'm s^-2' for '\text{m}/\text{s}^2', "" for none; None when it
    is not one. noun: any word of four letters, or in \text{}, counts: '12 apples'.

    A unit of one Latin letter stands in \text{} or after a space, or is the letter that is
    expected: 5m is five times m.
    """
    if not text:
        return ""
    if len(text) == 1 and text.isascii() and text.isalpha() and text != letter:
        return None
    plain = re.sub(r"\bper\b", "/", re.sub(r"\bper cent\b", "%", words(text)))
    plain = re.sub(r"\\cdot|\*", " ", plain).replace(r"^\circ C", r"^\circC")
    tokens = _TOKEN.findall(plain)
    if "".join(tokens).replace(" ", "") != plain.replace(" ", ""):
        return None
    marked = r"\text{" in text
    exponents: Counter[str] = Counter()
    last, power, side, closed = "", 1, 1, True
    for token in tokens:
        singular = token[:-1] if len(token) > 2 and token.endswith("s") else token
        name = _UNIT.get(token.replace(" ", "")) or _UNIT.get(singular)
        if token in ("(", ")"):
            closed = token == ")"
            side = 1 if closed else side
        elif token in ("/", "每", "毎"):
            side = -1
        elif token in ("square", "sq", "cubic", "平方", "立方"):
            power = _POWERS[token]
        elif token in _POWERS or (token[0] == "^" and not name):
            if not last:
                return None
            sign = 1 if exponents[last] > 0 else -1
            raised = _POWERS.get(token) or int(token.strip("^{}"))
            exponents[last] += sign * (raised - 1)
        elif name or (noun and _is_noun(token, marked=marked, spaced=text[0] == " ")):
            last = name or singular.lower()
            exponents[last] += side * power
            power, side = 1, side if not closed else 1
        else:
            return None
    return _written(exponents)


def _is_noun(token: str, *, marked: bool, spaced: bool) -> bool:
    return marked or (spaced and len(token) > 3) or bool(re.match(f"[{CJK}]", token))


def _written(exponents: Counter[str]) -> str:
    counted = [name for name in exponents if name in _COUNTERS]
    if len(exponents) > len(counted) and set(exponents.values()) == {1}:
        for name in counted:  # 12个苹果 are apples
            del exponents[name]
    return " ".join(
        name if power == 1 else f"{name}^{power}"
        for name, power in sorted(exponents.items())
        if power
    )


def same_unit(name: str, other: str) -> bool:
    """Whether two canonical names can mean one unit: ¥ is yuan or yen, 个 counts anything."""
    atoms, others = name.split(), other.split()
    return len(atoms) == len(others) and all(
        a == b
        or _MEANINGS.get(a, {a}) & _MEANINGS.get(b, {b})
        or ("个" in (a, b) and all(c in _COUNTERS or c not in _UNITS for c in (a, b)))
        for a, b in zip(atoms, others, strict=True)
    )


def quantity(text: str, *, noun: bool = True, letter: str = "") -> tuple[Fraction, str] | None:
    """(value, unit) of a number with its unit before or behind it, a percent sign among them."""
    sign = -1 if text.startswith("-") else 1
    text = text[1:].strip() if text[:1] in ("-", "+") else text
    currency = ""
    if match := _CURRENCY.match(text):
        currency, text = _UNIT[words(match.group()).strip()], text[match.end() :]
    elif (match := re.match(r"(?:百分之|百分の)(?=[0-9])", text)) is not None:
        currency, text = "%", text[match.end() :]
    if not (match := _VALUE.match(text)) or (value := _unsigned(match.group())) is None:
        return None
    name = unit(text[match.end() :], noun=noun, letter=letter)
    if name is None or (currency and name and not same_unit(name, currency)):
        return None
    return sign * value, name or currency
