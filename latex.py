r"""The reader: an answer's text into a small expression tree.

    clean   one spelling: no $…$, \left or \text; commands and Unicode become single marks
    read    cleaned text -> (node, unit); a node is what values.py computes with
    multiplier, dimensions    what a unit says: million, cm^2

What has two readings (1/2x, a^b^c, f(x) against f times x, 3\frac52) raises Undecided, and so does
what we do not know. Text never reaches eval, sympify or parse_expr; characters and nesting are
bounded here, the size of numbers in values.py.
"""
import re
from fractions import Fraction

from values import (
    ANALYTIC,
    MANY,
    QUOTIENTS,
    Undecided,
    add,
    binomial,
    ceil,
    factorial,
    floor,
    matrix,
    multiply,
    power,
    root,
    series,
)

MAX_DEPTH = 30  # nesting; also bounds our recursion, far below Python's limit


# ---- 1. one spelling -------------------------------------------------------------------------
# Private marks after `clean`: "…" quotes text, ⦃ ⦄ are the braces of a set, ⟦ ⟧ the brackets of a
# matrix, ⏎ ends a row.

_FUNCTIONS = set("""sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln log lg exp cis
    max min gcd lcm""".split())
_NAMES = _FUNCTIONS | set("sqrt pi frac binom sum prod".split())
GREEK = set("""alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda
    mu nu xi rho sigma tau phi varphi chi psi omega Gamma Delta Theta Lambda Sigma Phi Psi Omega
    ell""".split())
_COMMANDS = {name: mark for spellings, mark in (
    ("left right big Big bigg Bigg bigl bigr Bigl Bigr displaystyle textstyle limits", ""),
    ("tiny small normalsize large Large LARGE huge Huge bf it rm sf tt", ""),
    ("quad qquad", " "), ("dfrac tfrac cfrac", r"\frac"), ("dbinom tbinom", r"\binom"),
    ("bar dot", r"\overline"), ("cdot times ast", "*"), ("div", "/"), ("pm", "±"), ("mp", "∓"),
    ("circ degree", "°"), ("infty", "∞"), ("lbrace", "⦃"), ("rbrace", "⦄"), ("mid colon", ":"),
    ("lvert rvert vert", "|"), ("langle", "⟨"), ("rangle", "⟩"), ("lfloor", "⌊"), ("rfloor", "⌋"),
    ("lceil", "⌈"), ("rceil", "⌉"), ("le leq leqslant", "≤"), ("ge geq geqslant", "≥"),
    ("lt", "<"), ("gt", ">"), ("ne neq", "≠"), ("in", "∈"), ("cup bigcup", "∪"),
    ("cap bigcap", "∩"), ("setminus backslash", "∖"), ("emptyset varnothing", "∅"),
    ("lor vee", " or "), ("land wedge", " and "), ("R", "ℝ"), ("Z", "ℤ"), ("N", "ℕ"),
    ("ldots dots cdots dotsc", "…"),
    ("approx simeq", "≈"),
) for name in spellings.split()}
_UNICODE = str.maketrans({
    "−": "-", "–": "-", "×": "*", "·": "*", "⋅": "*", "÷": "/", "π": r"\pi ", "√": r"\sqrt ",
    "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "²": "^2", "³": "^3", "½": " 1/2",
    "¼": " 1/4", "¾": " 3/4", "⁄": "/", "¢": ' "cents"', "⩽": "≤", "⩾": "≥", "∶": ":", ";": ",",
    "€": None, "£": None, '"': None, "⦃": None, "⦄": None, "⏎": None, "⟦": None, "⟧": None,
})
_NUMERALS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
    fifteen sixteen seventeen eighteen nineteen twenty""".split()
_PHRASES = {
    "no solution": "∅", "no solutions": "∅", "there is no solution": "∅", "empty set": "∅",
    "there are no solutions": "∅", "the empty set": "∅", "⦃⦄": "∅", "⦃ ⦄": "∅", "infinity": "∞",
    "all real numbers": "ℝ", "all reals": "ℝ", "all real x": "ℝ", "dne": "does not exist",
} | {word: str(number) for number, word in enumerate(_NUMERALS)}


_FRENCH = re.compile(r"^ ?((?:[A-Za-z] ?∈ ?)?)([][(])([^][(),]+,[^][(),]+)([][)]) ?$")


def _unreverse(m: re.Match) -> str:
    """]3,4[ is (3,4)."""
    return m[1] + m[2].replace("]", "(") + m[3] + m[4].replace("[", ")")


def clean(text: str) -> str:
    s = re.sub(r"√ ?([0-9]+)", r"\\sqrt{\1}", " ".join(text.split())).translate(_UNICODE)
    if s.startswith("**") and s.endswith("**"):
        s = s[2:-2]
    money = r"\$" in s or s.count("$") % 2 == 1
    s = s.replace(r"\\", "⏎").replace(r"\{", "⦃").replace(r"\}", "⦄").replace(r"\%", "%")
    s = s.replace(r"\$", "").replace("$", "").replace("**", "^").replace("\\|", "|")
    s = re.sub(r"(?<=[0-9]) ?(?:,\\!|\{ ?, ?\}|\\,) ?(?=[0-9]{3}(?![0-9]))", "", s)  # 10,\!080
    s = re.sub(r"(?<=[0-9])\{ ?\. ?\}(?=[0-9])", ".", s)  # 326{.}5
    s = re.sub(r"(?<![A-Za-z\\])(?!(?:(?<=[0-9])|(?<=[0-9] )|(?<=\\,))[dghms])([A-Za-z])"
               r"\\, ?(?=[0-9])", r"\1*", s)  # p\,7^d, but not 5 h\,30
    s = re.sub(r"\\(?:text)?color ?(?:\[[^][]*\] ?)?\{[^{}]*\}|\\phantom ?(?:\{[^{}]*\}|\S)", "", s)
    s = re.sub(r"⏎(?: ?\[-?[0-9.]+ ?[a-z]{2}\]| ?⏎)+", "⏎", s)  # \\[2pt], \\\\
    s = re.sub(r"\\[()\[\]]|\\[,;:!> ]|~|\\(?:left|right) ?\.", " ", s)
    s = re.sub(r"\\mathbb ?\{? ?([RZNQC]) ?\}?", lambda m: "ℝℤℕℚℂ"["RZNQC".index(m[1])], s)
    s = re.sub(r"\{ ?\\(rm|bf|it|sf|tt) ([^{}]*)\}", r"\\math\1{\2}", s)
    s = re.sub(r"\\(text[a-z]*|mbox|(?:math)?(?:rm|bf|it|sf|tt)|boldsymbol|operatorname)"
               r" ?\{([^{}]*)\}", _quote, s)
    s = re.sub(r"\\(?:boldsymbol|mathbf)(?= ?\{[^{}]*\{)", "", s)
    s = re.sub(r"\\([A-Za-z]+)", lambda m: _COMMANDS.get(m[1], m[0]), s)
    s = s.replace("<=", "≤").replace(">=", "≥").replace(" !=", "≠").replace("...", "…")
    s = re.sub(r"(?<=[0-9]) ?[xX] ?(?=10 ?\^)", "*", s)  # 1.2 x 10^5
    s = re.sub(r"[₀-₉]+", lambda m: "_{" + "".join(str(ord(c) - 0x2080) for c in m[0]) + "}", s)
    s = re.sub(r"\^ ?(?:\{ ?° ?\}|°)", "°", s)
    s = re.sub(r'° ?"?([CF])"?$', r' "degrees \1"', s)
    s = re.sub(r"(?<=[)\]]) ?U ?(?=[(\[])", "∪", s)
    s = re.sub(r"\( ?([0-9][0-9A-Z]*) ?\)(?= ?_)", r"\1", s)  # (52)_8
    s = re.sub(r"\\begin ?\{(?:[pb]|small)?matrix\}|"
               r"[(\[] ?\\begin ?\{array\} ?\{[lcr| ]*\}", "⟦", s)
    s = re.sub(r"\\end ?\{(?:[pb]|small)?matrix\}|\\end ?\{array\} ?[)\]]", "⟧", s)
    s = re.sub(r'\\frac ?\{ ?"([a-z]+)" ?\} ?\{ ?"?([a-z]+)"? ?\}[ .]*$', r' "\1/\2"', s)
    s = re.sub(r"_ ?\{ ?([a-z]) ?, ?([a-z]) ?\}", r"_{\1\2}", s)  # a_{i,j}
    s = re.sub(rf'_ ?(?:\{{ ?)?"?({"|".join(_NUMERALS[2:])})"?(?: ?\}})?(?![a-z])',
               lambda m: f"_{{{_NUMERALS.index(m[1])}}}", s)  # 22_{six}
    s = re.sub(r"(?<=[0-9])_ ?\{ ?\( ?([0-9]+) ?\) ?\}", r"_{\1}", s)  # 203_{(7)}
    s = re.sub(r"^\\overline ?\{ ?([0-9]+) ?\}(?= ?_)", r"\1", s)
    s = " ".join(s.split()).lstrip("=≈ ")
    joined = " ∧ ", " ∨ "  # 1 and 2, 1 or 2 are lists; x<1 or x>2 is not
    if not set(s) & set("<>≤≥≠"):
        joined = ", ", ", "
    for word, mark in zip(("and", "or"), joined, strict=True):
        s = re.sub(rf",? {word} |, ?{word} ", mark, s)
    s = re.sub(r", ?,", ",", s).rstrip(".,; ")
    choice = re.fullmatch(r'"?(?:option |choice )?"?\(?([A-Za-z])\)?\.?"?', s, re.I)
    if choice:
        return choice[1]  # (A), \text{A}, A.
    s = _PHRASES.get(s.replace('"', "").strip().casefold(), s)
    s = "∪".join(_FRENCH.sub(_unreverse, part) for part in s.split("∪"))
    if money and (m := re.fullmatch(r'([0-9.]+) ?(?:"per |/ ?")([^"]*)"', s)):
        return f'{m[1]} "dollars per {m[2]}"'
    if money and s[-1:] in "0123456789}" and not re.search(r"[,(\[⦃]", s):
        s += ' "dollars"'
    return s


def _quote(m: re.Match) -> str:
    body = m[2].strip()
    if body.strip(", ") in ("and", "or"):
        return f" {body} "
    if body in ("min", "sec") and not m.string[m.end():].strip(" .") and (
            m.string[:m.start()].rstrip()[-1:] in set("0123456789}")):
        return f' "{body}" '  # 40 \\mathrm{min}: nothing follows, so no function
    if words := re.fullmatch(r"([A-Za-z ]*[a-z]{3}) ?=", body):
        return f' "{words[1]}" = '
    if not m[1].startswith(("text", "mbox")) and (len(body) < 2 or body in _NAMES):
        return f"\\{body} " if body in _NAMES else body
    if re.search(r"[0-9,=+^]", body) or not re.search("[A-Za-z]", body):
        return f" {body} "  # \text{5 cm}, \text{A, B}: text only in looks
    return f' "{body}" '


def thousands(s: str) -> str:
    """1,000 is a number if no other comma or bracket makes it part of a list."""
    joined = re.sub(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d|,\d)", lambda m: m[0].replace(",", ""), s)
    joined = re.sub(r"(?<![\d.,] )(?<![\d.,^])[1-9]\d{0,2}(?: \d{3})+(?![\d/ ])",
                    lambda m: m[0].replace(" ", ""), joined)
    unspaced = joined.replace(", ", "")  # 1,000, 2,000: the commas of the list have spaces
    return s if "," in unspaced or ", " not in s and re.search(r"[,(\[⦃]", joined) else joined


def key(s: str) -> str:
    """Text without quotes and spaces, except a space between digits: `1 1/2` is not 11/2."""
    return re.sub(r"(?<![0-9]) | (?![0-9])", "", s.replace('"', "").rstrip(". "))


# ---- 2. reading ------------------------------------------------------------------------------

_SHORT_UNITS = set("""cm mm km kg mg ml mL lb lbs oz gal ft in yd mi min sec hr hrs day mph cup per
    sq""".split())
_NOT_UNITS = set("""or and not if more less least most base times mod where for than is are such
    form""".split())
_FUNCTION_LETTERS = set("f g h F G phi varphi sigma tau Gamma zeta".split())
_TOKEN = re.compile(r'"[^"]*"|[0-9]*\.[0-9]*\\overline ?\{? ?[0-9]+ ?\}?'
                    r"|[0-9]+\.[0-9]+[eE][+-]?[0-9]{1,3}(?![0-9])|[0-9]+[eE][0-9]{1,3}(?![0-9])"
                    r"|[A-Z]*[0-9][0-9A-Z]*(?= ?_ ?\{? ?1[1-6])"  # A5_{12}
                    r"|[0-9]+(?:\.[0-9]+)?|\.[0-9]+|\\[A-Za-z]+|[A-Za-z]+|\S")
_INFIX = {"\\over", "\\choose"}  # TeX's {a \over b}
_CLOSING = {"(": ")", "[": "]", "{": "}", "|": "|", "⌊": "⌋", "⌈": "⌉", "⦃": "⦄"}


def _is_number(token: str) -> bool:
    return token.isascii() and token[:1] not in ('"', "\\") and any(map(str.isdigit, token))


def _is_word(token: str) -> bool:
    long = token.isalpha() and token.isascii() and len(token) > 3 and token not in _NAMES
    return token[0] == '"' or long or token in _SHORT_UNITS


def read(s: str):
    """(node, unit); plain text is (None, the text)."""
    raw = _TOKEN.findall(s)
    tokens = [t[1:] if t[0] == "\\" and t[1:] in _NAMES else t for t in raw]
    if re.fullmatch(r"[A-Za-z .'\"-]+", s) and not set(tokens) & _NAMES:
        text = s.replace('"', "").strip().casefold()
        if text in ("yes", "no", "odd", "all") or any(map(_is_word, tokens)):
            return None, re.sub(r"^(?:the|an?) ", "", text)
    unit = ""
    for at in [at for at, t in enumerate(raw) if at and _is_word(t)][:1]:  # sec, but not \sec
        tail = " ".join(t.strip('"') for t in tokens[at:]).strip(" .()").casefold()
        if not re.fullmatch(r"[a-z ./^{}23*-]+", tail) or set(tail.split()) & _NOT_UNITS:
            raise Undecided("words that may change the value")
        unit, tokens = re.sub("^of an? ", "", tail), tokens[:at]
    if unit in ("percent", "per cent") or tokens[-1:] == ["%"]:
        unit, tokens = "%", [t for t in tokens if t != "%"]
    elif unit in ("degree", "degrees", "deg"):
        unit = "°"
    elif tokens[-1:] == ["°"] and not set(tokens) & _FUNCTIONS:
        unit, tokens = "°", [t for t in tokens if t != "°"]
    if "∞" in tokens and tokens not in (["∞"], ["+", "∞"], ["-", "∞"]):
        raise Undecided("arithmetic with infinity")
    runs = [t.isalpha() and t.isascii() and t not in _NAMES for t in tokens]
    neighbours = zip(runs, runs[1:], tokens, tokens[1:], strict=False)
    if any(run and next_run and len(t + u) > 2 for run, next_run, t, u in neighbours):
        raise Undecided("words, or a product of letters?")
    reader = _Reader([letter for t, run in zip(tokens, runs, strict=True)
                      for letter in (t if run and len(t) < 4 else [t])])
    node = reader.expression()
    if reader.peek():
        raise Undecided(f"unexpected {reader.peek()}")
    return node, unit


class _Reader:
    """Recursive descent over LaTeX and plain notation. Unknown or ambiguous: Undecided."""

    def __init__(self, tokens: list[str]):
        self.tokens, self.at, self.depth, self.bars = tokens, 0, 0, 0

    def peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self, expected: str = "") -> str:
        token = self.peek()
        if not token or expected and token != expected:
            raise Undecided(f"expected {expected or 'more'}")
        self.at += 1
        return token

    def expression(self, close: str = ""):
        node = self.sum()
        if close in ("", "}") and self.peek() in _INFIX:
            over, below = self.take() == "\\over", self.sum()
            node = (multiply, node, inverse(below)) if over else (binomial, node, below)
        if close:
            self.take(close)
        return node

    def sum(self):
        terms = [self.term()]
        while self.peek() in ("+", "-"):
            terms.append(self.term())
        return terms[0] if len(terms) == 1 else (add, *terms)

    def term(self):
        factors, slash = [self.factor()], False
        while token := self.peek():
            if token in ("*", "/"):
                slash = self.take() == "/"
                factors.append(inverse(self.factor()) if slash else self.factor())
            elif self.starts_factor(token):
                if slash:
                    raise Undecided("1/2x has two readings")
                factors.append(self.factor())
            else:
                break
        return factors[0] if len(factors) == 1 else (multiply, *factors)

    def starts_factor(self, token: str) -> bool:
        power_before = self.tokens[self.at - 2:self.at - 1] == ["^"]
        if (_is_number(token) and not power_before
                and self.tokens[self.at - 1] not in (")", "}", "]", "!")
                and not self.power_of_letters()):
            raise Undecided("2 3 and x2 are not products we would bet on; 2^6 3^5 is one")
        if token == "|":
            return not self.bars  # else it closes the open one
        if token in _INFIX:
            return False
        return token.isalnum() or token[0] in "\\.([{⌊⌈⟦"

    def power_of_letters(self) -> bool:
        """The 2 of n2^n: not that of x2, nor of x2^2."""
        before, (_, caret, *exponent) = self.tokens[self.at - 1], (self.tokens + [""])[self.at:]
        letters = [t for t in exponent[:2] if t != "{"][:1]
        return before.isalpha() and len(before) == 1 and caret == "^" and (
            bool(letters) and letters[0].isalpha() and len(letters[0]) == 1)

    def factor(self):
        negative = False
        while self.peek() in ("+", "-"):
            negative ^= self.take() == "-"
        node = self.atom()
        while self.peek() in ("^", "!", "°"):
            mark = self.take()
            if mark == "^":
                node = (power, node, self.exponent())
            elif mark == "°":
                node = (multiply, node, "pi", Fraction(1, 180))
            elif self.peek() == "!":
                self.take()
                node = (factorial, node, Fraction(2))
            else:
                node = (factorial, node, Fraction(1))
            if self.peek() == mark:
                raise Undecided("n!!! and a^b^c have two readings")
        return minus(node) if negative else node

    def exponent(self):
        """Unlike TeX, 2^10 is 2^{10} and 2^-1 is 2^{-1}: what the writer must have meant."""
        sign = self.take() if self.peek() in ("+", "-") else ""
        node = self.argument(whole=True)
        return minus(node) if sign == "-" else node

    def argument(self, whole: bool = False):
        """A TeX argument: a group or one token, so that \\frac12 is a half; or a whole number."""
        token = self.peek()
        if not _is_number(token):
            return self.atom()
        if not whole:
            self.tokens[self.at:self.at + 1] = list(token)  # \\sqrt12 leaves a stray 2: undecided
        return Fraction(self.take())

    def atom(self):
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Undecided("nested too deeply")
        token = self.take()
        if _is_number(token):
            node = self.number(token)
        elif token in ("(", "[", "{"):
            node = self.expression(close=_CLOSING[token])
        elif token == "|":
            self.bars += 1
            node = (abs, self.expression(close="|"))
            self.bars -= 1
        elif token in ("⌊", "⌈"):
            node = (floor if token == "⌊" else ceil, self.expression(close=_CLOSING[token]))
        elif token == "⟦":
            node = self.matrix()
        elif token == "frac":
            grouped = self.peek() == "{"
            top = self.argument()  # \frac{7}12 must have meant 7/12
            node = (multiply, top, inverse(self.argument(whole=grouped)))
        elif token == "binom":
            node = (binomial, self.argument(), self.argument())
        elif token == "sqrt":
            degree = Fraction(2)
            if self.peek() == "[":
                self.take()
                degree = self.expression(close="]")
            node = (root, self.argument(), degree)
        elif token in ("sum", "prod"):
            node = self.series(add if token == "sum" else multiply)
        elif token in MANY:
            node = (MANY[token], *self.items())
        elif token in _FUNCTIONS:
            node = self.function(token)
        else:
            node = self.name(token)
        self.depth -= 1
        return node

    def number(self, token: str):
        if self.peek() == "_":  # 52_8: digits in a base
            base = self.subscript()
            if not (token.isalnum() and base.isdigit() and 2 <= int(base) <= 36):
                raise Undecided("not a base")
            return Fraction(int(token, int(base)))  # a digit beyond the base: ValueError, undecided
        if "\\" in token:  # 0.1\overline{6} is (16 - 1)/90
            fixed, _, cycle = token.partition(r"\overline")
            cycle = cycle.strip("{ }")
            shift, nines = 10 ** len(fixed.partition(".")[2]), 10 ** len(cycle) - 1
            return Fraction((fixed + "0").strip()) + Fraction(int(cycle), nines * shift)
        whole = Fraction(token)
        if token.isdigit() and self.peek() == "frac":
            part = self.atom()
        elif token.isdigit() and _is_number(self.peek()) and self.tokens[self.at + 1:][:1] == ["/"]:
            top = Fraction(self.take())
            part = (multiply, top, inverse(Fraction(self.take("/") and self.take())))
        else:
            return whole
        top, (_, bottom, _) = part[1:]
        if not (isinstance(top, Fraction) and isinstance(bottom, Fraction)):
            return (multiply, whole, part)  # 5\frac{\pi}{3}
        if not 0 < top < bottom:
            raise Undecided("a mixed number, or a product?")
        return (add, whole, part)  # 1\frac12

    def name(self, token: str):
        letter = len(token) == 1 and token.isascii() and token.isalpha()
        if not (letter or token in ("pi", "∞") or token[0] == "\\" and token[1:] in GREEK):
            raise Undecided(f"unknown {token}")
        if self.peek() == "_":
            token += "_" + self.subscript()
        if self.peek() == "(" and token.lstrip("\\") in _FUNCTION_LETTERS:
            raise Undecided("f(x) is not f times x")
        return token

    def subscript(self) -> str:
        self.take("_")
        name = self.take()
        if name == "{":
            end = self.tokens.index("}", self.at)  # ValueError, undecided: it is not closed
            name, self.at = "".join(self.tokens[self.at:end]), end + 1
        return name

    def matrix(self):
        rows, mark = [], "⏎"
        while mark != "⟧":
            rows += [[]] if mark == "⏎" else []
            rows[-1].append(self.expression())
            mark = self.take()
            if mark == "⏎" and self.peek() == "⟧":  # the last row may end in \\\\, too
                mark = self.take()
            if mark not in "&⏎⟧" or mark != "&" and len(rows[-1]) != len(rows[0]):
                raise Undecided("not the next cell, or rows of unequal length")
        return (matrix, Fraction(len(rows[0])), *[cell for row in rows for cell in row])

    def items(self) -> list:
        """(a, b, …) of \\max and the like."""
        opening = self.take()
        if opening not in ("(", "⦃", "{"):
            raise Undecided("\\max of what?")
        nodes = [self.expression()]
        while self.peek() == ",":
            self.take()
            nodes.append(self.expression())
        self.take(_CLOSING[opening])
        return nodes

    def series(self, combine):
        """\\sum_{k=1}^{n} takes the rest of its term."""
        for expected in ("_", "{"):
            self.take(expected)
        name = self.name(self.take())
        self.take("=")
        low = self.expression(close="}")
        self.take("^")
        return (series, combine, name, low, self.exponent(), self.term())

    def function(self, name: str):
        base = exponent = None
        if name == "log" and self.peek() == "_":
            self.take()
            base = self.exponent()
        if self.peek() == "^":
            self.take()
            exponent = self.exponent()
        if self.peek() in ("(", "{", "["):
            arg = self.atom()
            if self.peek() in ("^", "!"):
                raise Undecided("sin(x)^2 has two readings")
        else:  # \sin 5x \cos x: numbers, letters, roots and fractions belong to the argument
            arg = (multiply, self.factor())
            while (t := self.peek()) and (t in ("pi", "frac", "sqrt") or t[0] == "\\" or
                                          len(t) == 1 and t.isalpha()):
                arg += (self.factor(),)
            if self.peek() == "/":
                raise Undecided("\\sin x/2 has two readings")
        if exponent in (minus(Fraction(1)), Fraction(-1)):
            if name not in ("sin", "cos", "tan"):
                raise Undecided("\\sinh^{-1} x may be its inverse or 1/\\sinh x")
            name, exponent = "arc" + name, None
        if name == "exp":
            node = (power, "e", arg)
        elif name == "cis":
            node = (power, "e", (multiply, "i", arg))
        elif name in ("log", "lg"):  # an unadorned \log has an unknown base, called "log"
            base = Fraction(10) if name == "lg" else "log" if base is None else base
            node = (multiply, (ANALYTIC["ln"], arg), inverse((ANALYTIC["ln"], base)))
        elif name in QUOTIENTS:
            top, bottom = (ANALYTIC.get(f) for f in QUOTIENTS[name])
            node = (multiply, (top, arg) if top else Fraction(1), inverse((bottom, arg)))
        else:
            node = (ANALYTIC[name], arg)
        return node if exponent is None else (power, node, exponent)


def minus(node):
    return (multiply, Fraction(-1), node)


def inverse(node):
    return (power, node, Fraction(-1))


# ---- 3. units --------------------------------------------------------------------------------

_MULTIPLIERS = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9,
                "trillion": 10**12}
_NO_UNIT = re.compile(r"(?:(?:square|sq|cubic)[ .]*)?units?(?: ?\^.*)?|rad(?:ian)?s?")
_UNITS = {name: (Fraction(factor), dimension, exponent)
          for dimension, exponent, table in (
    ("length", 1, """m meter metre 1; km kilometer kilometre 1000; cm centimeter centimetre 0.01;
        mm millimeter millimetre 0.001; in inch 0.0254; ft foot feet 0.3048; yd yard 0.9144;
        mi mile 1609.344"""),
    ("length", 2, "acre 4046.8564224; hectare 10000"),
    ("length", 3, "l liter litre 0.001; ml milliliter millilitre 0.000001; "
                  "gal gallon 0.003785411784; quart 0.000946352946; pint 0.000473176473"),
    ("mass", 1, "g gram 1; kg kilogram 1000; mg milligram 0.001; lb pound 453.59237; "
                "oz ounce 28.349523125"),
    ("time", 1, "s sec second 1; min minute 60; h hr hour 3600; day 86400; week 604800"),
    ("money", 1, "dollar usd 1; cent 0.01"))
          for row in table.split(";")
          for *spellings, factor in [row.split()]
          for name in spellings}
DIMENSIONS = {dimension for _, dimension, _ in _UNITS.values()}


def multiplier(unit: str) -> tuple[int, str]:
    """`million dollars` is (10^6, dollars); a bare `units` or `radians` says nothing."""
    word, _, rest = unit.partition(" ")
    unit, factor = (rest, _MULTIPLIERS[word]) if word in _MULTIPLIERS else (unit, 1)
    return factor, "" if _NO_UNIT.fullmatch(unit) else unit


def dimensions(unit: str) -> tuple[Fraction, dict[str, int]]:
    """`cm^2` is (1/10000, {length: 2}). A word we do not know is a dimension of its own."""
    scale, powers, direction, square = Fraction(1), {}, 1, 1
    for word, exponent in re.findall(r"([a-z]+|[/°%])[ .{}]*\^?[ {]*(-?[1-3])?",
                                     unit.replace("mph", "mile per hour")):
        if word in ("/", "per"):
            direction = -1
        elif word in ("square", "sq", "cubic"):
            square = 3 if word == "cubic" else 2
        else:
            stems = word, word.removesuffix("s"), word.removesuffix("es")
            factor, name, degree = next((_UNITS[w] for w in stems if w in _UNITS),
                                        (Fraction(1), stems[1], 1))
            exponent, square = direction * square * int(exponent or 1), 1
            scale *= factor ** exponent
            powers[name] = powers.get(name, 0) + degree * exponent
    return scale, {name: n for name, n in powers.items() if n}
