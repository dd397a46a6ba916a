r"""Grading: find the final answer in a response and decide whether it equals the gold answer.

    >>> grade(r"so we get <think>…</think> \boxed{\frac{1}{2}}", "0.5")
    1.0
    >>> grade(r"\boxed{0.333}", r"\frac13")         # rounding is not accepted
    0.0
    >>> grade(r"\boxed{9^{9^{9^9}}}", "1") is None  # beyond the limits: undecided, at once
    True

Three verdicts: 1.0 right, 0.0 wrong, None undecided. Undecided is counted, never trained on and
never called wrong: a grader that turns its own failures into zeros teaches the policy nonsense.
No answer in the response is 0.0. A text we cannot read (prose, an unknown command, something
beyond the limits), on either side, is right if both texts are the same and undecided otherwise.

`extract` takes what follows the last `</think>`, and there the last balanced \boxed or \fbox,
the innermost if nested. `lenient=True` is for base models, which rarely box: it also accepts
"answer is X", "Answer: X", "A: X", "#### X" and, failing these, the last number. Never use it as
a reward for a model that can box: it rewards truncated outputs that happen to end in a number.

`equal` goes from cheap to dear and stops at the first stage that decides:
  1. text         equal after removing spacing, $…$, \left, \text and the like;
  2. structure    bare lists (1, 2), sets and unions are unordered; tuples, intervals and matrices
                  are ordered. Types count: (1,2) is neither [1,2] nor \{1,2\};
  3. labels       `x=3` is 3, a one-sided unit is dropped (5 cm is 5, but 5 cm against 5 m is
                  undecided); p% is p/100 and also, its sign taken as a unit, p;
  4. numbers      rationals, decimals, mixed numbers and 52_8 compare exactly, as Fractions;
  5. expressions  compare numerically, with 150 digits, at random rational points that depend only
                  on the two texts. Every operation checks that enough correct digits are left,
                  and gives up if not, so `equal` means equal to 100 digits.
An identity true only for positive or only for integer variables (sqrt(x^2) and x) is undecided,
so is one that depends on the base of an unadorned \log.

Safe on hostile text: it is read by the small parser below and never reaches eval, sympify or
parse_expr. Size is bounded before arithmetic starts (characters, nesting, bits, magnitude, work),
so there is no timeout and no signal, and it works in threads. The arithmetic is mpmath, the
numerical engine sympy depends on: our own bottom-up evaluation can check and bound each step,
which the automatic evaluation of sympy objects and simplify cannot.

Left out, deliberately: rounding tolerance. Left out, for now: unit conversion, inequalities,
ratios, binomials, sums, integrals, and prose ("all odd n"): undecided unless the texts agree.
"""
import math
import os
import random
import re
import threading
from fractions import Fraction

import mpmath

MAX_TEXT = 20_000  # characters: beyond this only identical texts are equal
MAX_CHARS = 1_000  # characters we try to understand (below Python's 4300-digit limit for int)
MAX_DEPTH = 30     # nesting; also bounds our recursion, far below Python's limit
MAX_BITS = 20_000  # of an exact numerator or denominator: 2000! fits
MAX_MAG = 400_000  # binary exponent of an inexact value
MAX_WORK = 4_000   # operations for one call of `equal`


class Undecided(Exception):
    """We cannot tell; `equal` answers None."""


# ---- 1. extraction ---------------------------------------------------------------------------

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*(\{|[0-9]+(?:\.[0-9]+)?|[A-Za-z])?"
                  r"|\\.|[{}]", re.S)
_PHRASE = re.compile(r"(?im)(?:\banswer(?:\s+is\b|\s*:)|^[ \t]*A:|####)[ \t:*]*")
_NUMBER = re.compile(r"[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?(?![0-9])"
                     r"|[0-9]+(?:\.[0-9]+)?|\.[0-9]+")


def extract(text: str, *, lenient: bool = False) -> str | None:
    """The final answer as written, or None if there is none."""
    text = text.rpartition("</think>")[2]  # a prompt may already end in <think>
    if "<think>" in text:
        return None  # still thinking when it stopped
    answer = _last_box(text)
    if answer is None and lenient:
        answer = _last_phrase(text) or _last_number(text)
    return answer


def _last_box(text: str) -> str | None:
    # One pass with a stack of open braces, so unbalanced braces cost no rescans.
    # The balanced box that starts last is both the last one and, when nested, the innermost.
    open_braces, best_start, best = [], -1, None
    for m in _BOX.finditer(text):
        token = m[0]
        if token == "}":
            if open_braces:
                start, content = open_braces.pop()
                if start > best_start:
                    best_start, best = start, text[content:m.start()]
        elif token == "{":
            open_braces.append((-1, 0))
        elif m[1] == "{":
            open_braces.append((m.start(), m.end()))
        elif m[1]:
            best_start, best = m.start(), m[1]
    return (best or "").strip() or None


def _last_phrase(text: str) -> str | None:
    end = max((m.end() for m in _PHRASE.finditer(text)), default=None)
    if end is None:
        return None
    line = text[end:end + 300].split("\n")[0]
    answer = re.split(r"[.!?;](?:\s|$)", line)[0].rsplit("=", 1)[-1].strip(" \t*$.")
    # A sentence is no answer ("A: Let us think"): take one word, or something that opens as maths.
    readable = answer and (" " not in answer or re.match(r"[-+\\(\[{$.0-9]", answer))
    return answer if readable else None


def _last_number(text: str) -> str | None:
    end = max(text.rfind(d) for d in "0123456789") + 1
    start = end
    while start and text[start - 1] in "0123456789,.":
        start -= 1
    numbers = [m[0] for m in _NUMBER.finditer(text, start, end)]
    if not numbers:
        return None
    before = text[:end - len(numbers[-1])].rstrip("$\\")
    if before[-1:] not in ("-", "−"):
        return numbers[-1]
    left = before[:-1]  # a minus after a number or a bracket subtracts; "is -3" is a sign
    tight = left[-1:].isalnum() or left[-1:] in (")", "]", "}")
    spaced = left.rstrip(" ")[-1:]
    binary = tight or spaced.isdigit() or spaced in (")", "]", "}")
    return numbers[-1] if binary else "-" + numbers[-1]


# ---- 2. one spelling -------------------------------------------------------------------------
# Private marks after `_clean`: "…" quotes text, ⦃ ⦄ are the braces of a set, ⏎ ends a matrix row.

_FUNCTIONS = set("sin cos tan cot sec csc arcsin arccos arctan ln log exp".split())
_NAMES = _FUNCTIONS | {"sqrt", "pi", "frac"}
_GREEK = set("""alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda
    mu nu xi rho sigma tau phi varphi chi psi omega Gamma Delta Theta Lambda Sigma Phi Psi Omega
    ell emptyset varnothing""".split())
_COMMANDS = {
    "left": "", "right": "", "big": "", "Big": "", "bigl": "", "bigr": "", "Bigl": "", "Bigr": "",
    "displaystyle": "", "quad": " ", "qquad": " ", "dfrac": r"\frac", "tfrac": r"\frac",
    "cfrac": r"\frac", "cdot": "*", "times": "*", "div": "/", "pm": "±", "mp": "∓",
    "infty": "∞", "cup": "∪", "in": "∈", "circ": "°", "degree": "°", "lbrace": "⦃",
    "rbrace": "⦄", "lvert": "|", "rvert": "|", "vert": "|",
}
_UNICODE = str.maketrans({
    "−": "-", "–": "-", "×": "*", "·": "*", "⋅": "*", "÷": "/", "π": r"\pi ", "√": r"\sqrt ",
    "²": "^2", "³": "^3", '"': None, "⦃": None, "⦄": None, "⏎": None,
})
_SHORT_UNITS = set("""cm mm km kg mg ml mL lb lbs oz ft in yd mi min sec hr hrs day mph cup per
    sq""".split())
_NOT_UNITS = set("""hundred thousand million billion trillion dozen or and not if more less least
    most base times mod where for than""".split())
_SPELLED = re.compile("zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twel|thir|fif|"
                      "twen|hundred|thousand|million|half|quarter|dozen|infinit|undefined")
_SHORT_WORDS = {"yes", "no", "odd", "all"}
_FUNCTION_LETTERS = set("f g h F G phi varphi sigma tau Gamma zeta".split())


def _clean(text: str) -> str:
    s = " ".join(text.split()).translate(_UNICODE)
    if s.startswith("**") and s.endswith("**"):
        s = s[2:-2]
    money = r"\$" in s or s.count("$") % 2 == 1
    s = s.replace(r"\\", "⏎").replace(r"\{", "⦃").replace(r"\}", "⦄").replace(r"\%", "%")
    s = s.replace(r"\$", "").replace("$", "").replace("**", "^")
    s = re.sub(r"(?<=[0-9])(?:,\\!|\{,\}|\\,) ?(?=[0-9]{3}(?![0-9]))", "", s)  # 10,\!080
    s = re.sub(r"\\[()\[\]]|\\[,;:! ]|~", " ", s)
    s = re.sub(r"\\(text[a-z]*|mbox|math(?:rm|bf|it)|operatorname) ?\{([^{}]*)\}", _quote, s)
    s = re.sub(r"\\([A-Za-z]+)", lambda m: _COMMANDS.get(m[1], m[0]), s)
    s = re.sub(r"\^ ?(?:\{ ?° ?\}|°)", "°", s)
    s = re.sub(r" (?:and|or) |, ?(?:and|or) ", ", ", " ".join(s.split()))
    s = re.sub(r", ?,", ",", s).rstrip(".,; ")
    choice = re.fullmatch(r'"?\(?([A-Za-z])\)?\.?"?', s)
    if choice:
        return choice[1]  # (A), \text{A}, A.
    if money and s[-1:] in "0123456789}" and not re.search(r"[,(\[⦃]", s):
        s += ' "dollars"'
    return s


def _quote(m: re.Match) -> str:
    body = m[2].strip()
    if body in ("and", "or"):
        return " , "
    if m[1].startswith(("math", "op")) and (len(body) < 2 or body in _NAMES):
        return f"\\{body} " if body in _NAMES else body
    if re.search(r"[0-9,]", body) or not re.search("[A-Za-z]", body):
        return f" {body} "  # \text{5 cm}, \text{A, B}: text only in looks
    return f' "{body}" '


def _key(s: str) -> str:
    """Text without quotes and spaces, except a space between digits: `1 1/2` is not 11/2."""
    return re.sub(r"(?<![0-9]) | (?![0-9])", "", s.replace('"', "").rstrip(". "))


# ---- 3. structure ----------------------------------------------------------------------------

_MATRIX = re.compile(r"\\begin ?\{[pb]matrix\}(.*)\\end ?\{[pb]matrix\}")
_LABEL = re.compile(r"((?:[A-Za-z]|\\[a-z]+)[A-Za-z0-9_{}]*(?: ?\([a-z](?:, ?[a-z])*\))?"
                    r"|\([a-z](?:, ?[a-z])+\)) ?= ?([^=]+)")


def _cut(s: str, separator: str) -> list[str]:
    """Split at separators outside all brackets."""
    parts, depth, start = [], 0, 0
    for at, c in enumerate(s):
        if c in "([{⦃":
            depth += 1
            if depth > MAX_DEPTH:
                raise Undecided("nested too deeply")
        elif c in ")]}⦄":
            depth -= 1
        elif c == separator and depth == 0:
            parts.append(s[start:at].strip())
            start = at + 1
    return parts + [s[start:].strip()]


def _split(s: str) -> tuple[str, list[str]]:
    """(kind, items); kind is "" for a single value, "list" for a bare a, b."""
    if m := _MATRIX.fullmatch(s):
        rows = [_cut(row, "&") for row in _cut(m[1], "⏎") if row]
        return f"matrix of {[len(row) for row in rows]}", [cell for row in rows for cell in row]
    if len(parts := _cut(s, "∪")) > 1:
        return "union", parts
    if len(parts := _cut(s, ",")) == 1 and s[:1] in "([⦃" and s[-1:] in ")]⦄":
        inside = _cut(s[1:-1], ",")
        if len(inside) > 1 or s[0] == "⦃":
            return s[0] + s[-1], inside if s[0] + s[-1] != "⦃⦄" else _both_signs(inside)
    if len(parts) > 1 or "±" in s or "∓" in s:
        return "list", _both_signs(parts)
    return "", [s]


def _both_signs(items: list[str]) -> list[str]:
    plus_minus = [("±", "∓"), ("∓", "±")]
    return [item if up not in item and down not in item
            else item.replace(up, "+").replace(down, "-")
            for item in items
            for up, down in plus_minus[:2 if "±" in item or "∓" in item else 1]]


def _compare(a: str, b: str, work: list[int]) -> bool:
    if _key(a) == _key(b):
        return True
    a, b = (re.sub(r"^[A-Za-z] ?∈ ?", "", s) for s in (a, b))  # x \in [-2, 7]
    label_a, value_a = _unlabel(a)
    label_b, value_b = _unlabel(b)
    if "=" not in b and label_a or "=" not in a and label_b:
        return _compare(value_a, value_b, work)  # x=3 and 3
    if label_a and label_b:
        same = _compare(value_a, value_b, work)
        if same and label_a != label_b and max(len(label_a), len(label_b)) > 1:
            raise Undecided("f(x)=… and y=… may or may not mean the same")
        return same and label_a == label_b
    kind_a, xs = _split(a)
    kind_b, ys = _split(b)
    if kind_a == kind_b == "":
        return _compare_values(a, b, work)
    if kind_a != kind_b and {kind_a, kind_b} != {"list", "⦃⦄"}:
        return _compare_kinds("" in (kind_a, kind_b) or "list" in (kind_a, kind_b), xs, ys, work)
    if kind_a not in ("list", "⦃⦄", "union"):
        return len(xs) == len(ys) and all(map(_compare, xs, ys, [work] * len(xs)))
    labels_a, labels_b = ({_unlabel(x)[0] for x in items} for items in (xs, ys))
    if labels_a != labels_b and max(len(labels_a), len(labels_b)) > 1:
        raise Undecided("x=1, y=2 against 2, 1: unordered would lose the names")
    if kind_a == kind_b == "list":  # unordered, but 1, 1, 2 is not 1, 2, 2
        for x in xs:
            at = next((at for at, y in enumerate(ys) if _compare(x, y, work)), None)
            if at is None:
                return False
            ys = ys[:at] + ys[at + 1:]
        return not ys
    return (all(any(_compare(x, y, work) for y in ys) for x in xs)
            and all(any(_compare(x, y, work) for x in xs) for y in ys))


def _compare_kinds(loose: bool, xs: list[str], ys: list[str], work: list[int]) -> bool:
    for item in xs + ys:  # two types differ only if both could be read
        if _split(item)[0] == "":
            _read(_unlabel(item)[1])
    if loose and len(xs) == len(ys) and all(map(_compare, xs, ys, [work] * len(xs))):
        raise Undecided("1, 2 against (1, 2), 3 against {3}: same values, type not stated")
    return False


def _unlabel(s: str) -> tuple[str, str]:
    m = _LABEL.fullmatch(s)
    if m and not (len(m[1]) == 1 and re.search(rf"(?<![A-Za-z\\]){m[1]}(?![A-Za-z])", m[2])):
        return m[1].replace(" ", ""), m[2]
    return "", s


# ---- 4. reading ------------------------------------------------------------------------------
# text -> a node: a Fraction, a name, or (operation, node, …) with an operation of section 5

_TOKEN = re.compile(r'"[^"]*"|[0-9]+\.[0-9]+[eE][+-]?[0-9]{1,3}(?![0-9])|[0-9]+(?:\.[0-9]+)?'
                    r"|\.[0-9]+|\\[A-Za-z]+|[A-Za-z]+|\S")


def _is_number(token: str) -> bool:
    return token[-1:].isdecimal() and token.isascii()


def _is_word(token: str) -> bool:
    long = token.isalpha() and len(token) > 3 and token not in _NAMES
    return token[0] == '"' or long or token in _SHORT_UNITS


def _read(s: str):
    """(node, unit); plain text is (None, the text)."""
    tokens = [t[1:] if t[0] == "\\" and t[1:] in _NAMES else t for t in _TOKEN.findall(s)]
    text = s.replace('"', "").strip().casefold()
    if re.fullmatch(r"[A-Za-z .'\"-]+", s) and not set(tokens) & _NAMES:
        if text in _SHORT_WORDS or any(map(_is_word, tokens)):
            return None, text
    unit, words_at = "", [at for at, t in enumerate(tokens) if at and _is_word(t)][:1]
    for at in words_at:
        tail = "".join(t.strip('"').casefold().removesuffix("s") + " " for t in tokens[at:])
        if not re.fullmatch(r"[a-z ./^{}23]+", tail) or set(tail.split()) & _NOT_UNITS:
            raise Undecided("words that may change the value")
        unit, tokens = re.sub(r"[ .{}]", "", tail), tokens[:at]
    if unit == "percent" or tokens[-1:] == ["%"]:
        unit, tokens = "%", [t for t in tokens if t != "%"]
    elif tokens[-1:] == ["°"] and not set(tokens) & _FUNCTIONS:
        unit, tokens = "degree", [t for t in tokens if t != "°"]
    runs = [t.isalpha() and t not in _NAMES for t in tokens]
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
        terms = [self.term()]
        while self.peek() in ("+", "-"):
            terms.append(self.term())
        if close:
            self.take(close)
        return terms[0] if len(terms) == 1 else (_sum, *terms)

    def term(self):
        factors = [self.factor()]
        while token := self.peek():
            if token in ("*", "/"):
                self.take()
                factors.append(_inverse(self.factor()) if token == "/" else self.factor())
            elif self.starts_factor(token):
                factors.append(self.factor())
            else:
                break
        return factors[0] if len(factors) == 1 else (_product, *factors)

    def starts_factor(self, token: str) -> bool:
        if _is_number(token) and self.tokens[self.at - 1] not in (")", "}", "]"):
            raise Undecided("2 3 and x2 are not products we would bet on")
        if token == "|":
            return not self.bars  # else it closes the open one
        return token.isalnum() or token[0] in "\\.([{∞"

    def factor(self):
        negative = False
        while self.peek() in ("+", "-"):
            negative ^= self.take() == "-"
        node = self.atom()
        while self.peek() in ("^", "!", "°"):
            mark = self.take()
            if mark == "^":
                node = (_power, node, self.exponent())
            else:
                radian = "pi", Fraction(1, 180)
                node = (_factorial, node) if mark == "!" else (_product, node, *radian)
            if self.peek() == mark:
                raise Undecided("n!! and a^b^c have two readings")
        return _minus(node) if negative else node

    def exponent(self):
        """Unlike TeX, 2^10 is 2^{10} and 2^-1 is 2^{-1}: what the writer must have meant."""
        sign = self.take() if self.peek() in ("+", "-") else ""
        node = Fraction(self.take()) if _is_number(self.peek()) else self.atom()
        return _minus(node) if sign == "-" else node

    def argument(self):
        """A TeX argument: a group or one token, so that \\frac12 is a half."""
        token = self.peek()
        if not _is_number(token):
            return self.atom()
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
            node = self.expression(close={"(": ")", "[": "]", "{": "}"}[token])
        elif token == "|":
            self.bars += 1
            node = (abs, self.expression(close="|"))
            self.bars -= 1
        elif token == "frac":
            node = (_product, self.argument(), _inverse(self.argument()))
        elif token == "sqrt":
            degree = Fraction(2)
            if self.peek() == "[":
                self.take()
                degree = self.expression(close="]")
            node = (_root, self.argument(), degree)
        elif token in _FUNCTIONS:
            node = self.function(token)
        else:
            node = self.name(token)
        self.depth -= 1
        return node

    def number(self, token: str):
        if self.peek() == "_":  # 52_8: digits in a base
            base = self.subscript()
            if not (token.isdigit() and base.isdigit() and 2 <= int(base) <= 36):
                raise Undecided("not a base")
            return Fraction(int(token, int(base)))  # a digit beyond the base: ValueError, undecided
        whole = Fraction(token)
        if token.isdigit() and self.peek() == "frac":
            part = self.atom()
        elif token.isdigit() and _is_number(self.peek()) and self.tokens[self.at + 1:][:1] == ["/"]:
            top = Fraction(self.take())
            part = (_product, top, _inverse(Fraction(self.take("/") and self.take())))
        else:
            return whole
        top, (_, bottom, _) = part[1:]
        if not (isinstance(top, Fraction) and isinstance(bottom, Fraction)):
            return (_product, whole, part)  # 5\frac{\pi}{3}
        if not 0 < top < bottom:
            raise Undecided("a mixed number, or a product?")
        return (_sum, whole, part)  # 1\frac12

    def name(self, token: str):
        letter = len(token) == 1 and token.isascii() and token.isalpha()
        if not (letter or token in ("pi", "∞") or token[0] == "\\" and token[1:] in _GREEK):
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

    def function(self, name: str):
        base = power = None
        if name == "log" and self.peek() == "_":
            self.take()
            base = self.exponent()
        if self.peek() == "^":
            self.take()
            power = self.exponent()
        if self.peek() in ("(", "{", "["):
            arg = self.atom()
            if self.peek() in ("^", "!"):
                raise Undecided("sin(x)^2 has two readings")
        else:  # \sin 5x \cos x: numbers, letters, roots and fractions belong to the argument
            arg = (_product, self.factor())
            while (t := self.peek()) and (t in ("pi", "frac", "sqrt") or t[0] == "\\" or
                                          len(t) == 1 and t.isalpha()):
                arg += (self.factor(),)
            if self.peek() == "/":
                raise Undecided("\\sin x/2 has two readings")
        if power in (_minus(Fraction(1)), Fraction(-1)) and name in ("sin", "cos", "tan"):
            name, power = "arc" + name, None
        if name == "exp":
            node = (_power, "e", arg)
        elif name == "log":  # an unadorned \log has an unknown base, called "log"
            base = "log" if base is None else base
            node = (_product, (_ANALYTIC["ln"], arg), _inverse((_ANALYTIC["ln"], base)))
        elif name in _QUOTIENTS:
            top, bottom = (_ANALYTIC.get(f) for f in _QUOTIENTS[name])
            node = (_product, (top, arg) if top else Fraction(1), _inverse((bottom, arg)))
        else:
            node = (_ANALYTIC[name], arg)
        return node if power is None else (_power, node, power)


def _minus(node):
    return (_product, Fraction(-1), node)


def _inverse(node):
    return (_power, node, Fraction(-1))


# ---- 5. operations ---------------------------------------------------------------------------
# Values are Fraction while exact, then mpf or mpc. Every operation keeps about 100 correct digits,
# or raises Undecided.

_MP = mpmath.mp.clone()
_MP.dps = 150
_ZERO, _SMALL = _MP.mpf(10) ** -100, _MP.mpf(10) ** -40  # below: zero; between: digits were lost
_LOCK = threading.Lock()  # mpmath switches precision and caches constants without one
if hasattr(os, "register_at_fork"):  # a child forked while another thread held the lock
    os.register_at_fork(after_in_child=lambda: globals().update(_LOCK=threading.Lock()))


def _bits(x: Fraction) -> int:
    return max(x.numerator.bit_length(), x.denominator.bit_length())


def _inexact(x):
    if not isinstance(x, Fraction):
        return x
    if _bits(x) > 160:
        raise Undecided("two huge integers may look alike once rounded")
    return _MP.mpf(x.numerator) / x.denominator


def _checked(x):
    """Bound the size; drop a real or imaginary part that is only rounding noise."""
    if isinstance(x, Fraction):
        if _bits(x) > MAX_BITS:
            raise Undecided("exact number too long")
        return x
    if isinstance(x, _MP.mpc):
        if abs(x.imag) <= _ZERO * abs(x.real):
            x = x.real
        elif abs(x.real) <= _ZERO * abs(x.imag):
            x = _MP.mpc(0, x.imag)
    if x == 0 or not _MP.isfinite(x) or abs(_MP.mag(x)) > MAX_MAG:
        raise Undecided("out of range")
    return x


def _nonzero(x, scale=1):
    """0 if x is rounding noise beside `scale`; Undecided if cancellation left too few digits."""
    if abs(x) <= _ZERO * scale:
        return Fraction(0)
    if abs(x) < _SMALL * scale:
        raise Undecided("cancellation")
    return _checked(x)


def _sum(*terms):
    exact = _checked(sum((t for t in terms if isinstance(t, Fraction)), Fraction(0)))
    inexact = [t for t in terms if not isinstance(t, Fraction)]
    if not inexact:
        return exact
    if exact:
        inexact.append(_inexact(exact))
    sizes = [abs(t) for t in inexact]
    if min(sizes) < _SMALL * max(sizes):
        raise Undecided("a term too small to be seen beside the others")
    return _nonzero(_MP.fsum(inexact), max(sizes))


def _product(*factors):
    exact, inexact = Fraction(1), None
    for x in factors:
        if isinstance(x, Fraction):
            exact = _checked(exact * x)
        else:
            inexact = x if inexact is None else _checked(inexact * x)
    return exact if inexact is None or exact == 0 else _checked(inexact * _inexact(exact))


def _power(x, y):
    whole = isinstance(y, Fraction) and y.denominator == 1
    if x == 0:
        if isinstance(y, Fraction) and y > 0:
            return Fraction(0)
        raise Undecided("0 to the power 0 or less")
    if whole and isinstance(x, Fraction):
        if x in (1, -1):
            return x if y % 2 else Fraction(1)
        if abs(y) * _bits(x) > MAX_BITS:
            raise Undecided("power too large")
        return x ** int(y)
    if isinstance(y, Fraction) and y.denominator % 2 and not whole and _is_negative(x):
        raise Undecided("(-8)^(1/3): which branch?")
    exponent = _inexact(y) * _MP.log(_inexact(x))
    if abs(exponent) > MAX_MAG / 2:
        raise Undecided("power too large")
    return _checked(_MP.exp(exponent))


def _is_negative(x) -> bool:
    return not isinstance(x, _MP.mpc) and x < 0


def _root(x, degree):
    odd = isinstance(degree, Fraction) and degree.denominator == 1 and degree % 2
    if odd and _is_negative(x):
        return -_power(-x, 1 / degree)  # \sqrt[3]{-8} is the real root
    return _power(x, _power(degree, Fraction(-1)))


def _factorial(x):
    if not (isinstance(x, Fraction) and x.denominator == 1 and 0 <= x <= 2000):
        raise Undecided("factorial of a non-integer or out of range")
    return Fraction(math.factorial(int(x)))


def _analytic(f, bound: float):
    def apply(x):
        if abs(x) > bound:
            raise Undecided("argument out of range")
        return _nonzero(f(_inexact(x)))
    return apply


_ANALYTIC = {  # \ln 0 is -inf, which _nonzero refuses
    "sin": _analytic(_MP.sin, 1e5), "arcsin": _analytic(_MP.asin, 1e5),
    "cos": _analytic(_MP.cos, 1e5), "arccos": _analytic(_MP.acos, 1e5),
    "ln": _analytic(_MP.log, math.inf), "arctan": _analytic(_MP.atan, 1e5),
}
_QUOTIENTS = {"tan": ("sin", "cos"), "cot": ("cos", "sin"), "sec": ("", "cos"), "csc": ("", "sin")}
_CONSTANTS = {"pi": +_MP.pi, "e": +_MP.e, "i": _MP.mpc(0, 1)}


def _value(node, point: dict, work: list[int]):
    work[0] -= 1
    if work[0] < 0:
        raise Undecided("too much work")
    if isinstance(node, Fraction):
        return node
    if isinstance(node, str):
        return point[node] if node in point else _CONSTANTS[node]
    operation, *children = node
    return operation(*[_value(child, point, work) for child in children])


def _names(node) -> set[str]:
    if isinstance(node, tuple):
        return set().union(*map(_names, node[1:]))
    return {node} - set(_CONSTANTS) if isinstance(node, str) else set()


# ---- 6. comparing values ---------------------------------------------------------------------

def _compare_values(a: str, b: str, work: list[int]) -> bool:
    if "=" in a or "=" in b:
        return _compare_equations(a, b, work)
    (u, unit_a), (v, unit_b) = _read(a), _read(b)
    if u is None and v is None:
        if unit_a != unit_b and " " in unit_a + unit_b:
            raise Undecided("two phrases may mean the same")
        return unit_a == unit_b
    if u is None or v is None:
        if _names(u) | _names(v) or _SPELLED.search(unit_a if u is None else unit_b):
            raise Undecided("words against letters, or against a number they may spell")
        return False
    if unit_a and unit_b and unit_a != unit_b:
        raise Undecided("units are not converted")
    if ("_" in a) != ("_" in b) and a.partition("_")[0] == b.partition("_")[0]:
        raise Undecided("52 against 52_8: the problem may have fixed the base")
    with _LOCK:
        if (unit_a == "%") != (unit_b == "%"):
            percent, plain = (u, v) if unit_a == "%" else (v, u)
            hundredth = (_product, percent, Fraction(1, 100))
            return _same(percent, plain, a, b, work) or _same(hundredth, plain, a, b, work)
        return _same(u, v, a, b, work)


def _points(names: set[str], a: str, b: str) -> dict[str, list[dict]]:
    """Random, but a function of the two texts only. Sixteenths: (-1)^x has a principal value."""
    rng = random.Random(" & ".join(sorted((_key(a), _key(b)))))
    draws = {
        "real": [lambda: Fraction(rng.randrange(5, 64, 2) * rng.choice((-1, 1)), 16)] * 4,
        "positive": [lambda: Fraction(rng.randrange(5, 64, 2), 16)] * 3,
        "integer": [lambda: Fraction(rng.randrange(1, 40))] * 6,
    }
    return {kind: [{name: draw() for name in sorted(names)} for draw in several]
            for kind, several in draws.items()}


def _same(u, v, a: str, b: str, work: list[int]) -> bool:
    """Whether u = v identically: constants at once, else at points of three families."""
    def agree(points: list[dict]) -> bool | None:
        decided = 0
        for point in points:
            try:
                if _sum(_value(u, point, work), -_value(v, point, work)) != 0:
                    return False
                decided += 1
            except Undecided:
                pass  # a pole, say: the other points decide
        return True if 2 * decided >= len(points) else None

    def verdict(base: dict) -> bool:
        if not names:
            return _sum(_value(u, base, work), -_value(v, base, work)) == 0
        real, positive, integer = (agree([p | base for p in points[kind]]) for kind in points)
        if real is None:  # no value at some signs (x^{1/3}) or off the integers (n!)
            real = integer if positive is None else positive
        elif not real and (positive or integer):
            real = None
        if real is None:
            raise Undecided("true for some variables only, or no value at the points tried")
        return real

    names = _names(u) | _names(v)
    bases = [{"log": Fraction(10)}, {"log": _CONSTANTS["e"]}] if "log" in names else [{}]
    names -= {"log"}
    points = _points(names, a, b)
    verdicts = {verdict(base) for base in bases}
    if len(verdicts) > 1:
        raise Undecided("depends on the base of log")
    return verdicts.pop()


def _compare_equations(a: str, b: str, work: list[int]) -> bool:
    """Same if proportional as left minus right; different if a solution is not shared."""
    if a.count("=") != 1 or b.count("=") != 1:
        raise Undecided("an equation against a value, or a chain of equations")
    sides = [_read(side)[0] for side in a.split("=") + b.split("=")]
    f, g = ((_sum, left, _minus(right)) for left, right in (sides[:2], sides[2:]))
    names = _names(f) | _names(g)
    if None in sides or not names or "log" in names:
        raise Undecided("not equations in variables")
    with _LOCK:
        points = _points(names, a, b)["real"]
        (f0, g0), *rest = [(_value(f, p, work), _value(g, p, work)) for p in points]
        ratios = (_sum(_product(x, g0), -_product(y, f0)) for x, y in rest)
        if f0 != 0 and g0 != 0 and not any(ratios):
            return True
        for name in sorted(names):  # where f is linear in a name, solve and try the solution in g
            at_0, at_1 = (_value(f, points[0] | {name: Fraction(x)}, work) for x in (0, 1))
            if isinstance(at_0 - at_1, Fraction) and at_0 != at_1:
                root = points[0] | {name: at_0 / (at_0 - at_1)}
                if _value(f, root, work) == 0 and _value(g, root, work) != 0:
                    return False
    raise Undecided("not proportional, and no solution found to tell them apart")


# ---- 7. verdicts -----------------------------------------------------------------------------

def equal(answer: str, gold: str) -> bool | None:
    """Whether two answers are mathematically equal; None if undecided."""
    answer, gold = answer.strip(), gold.strip()
    if answer == gold:
        return True
    if max(len(answer), len(gold)) > MAX_TEXT:
        return None
    try:
        a, b = _clean(answer), _clean(gold)
        if not a or not b:
            return False if bool(a) != bool(b) else None
        if _key(a) == _key(b):
            return True
        if max(len(a), len(b)) > MAX_CHARS:
            return None
        return _compare(_thousands(a), _thousands(b), [MAX_WORK])
    except Exception:  # Undecided, or a hole in this file: an error must never become a 0 or a 1
        return None


def _thousands(s: str) -> str:
    """1,000 is a number if no other comma or bracket makes it part of a list."""
    joined = re.sub(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])", lambda m: m[0].replace(",", ""), s)
    return s if re.search(r"[,(\[⦃]", joined) else joined


def grade(response: str, gold: str, *, lenient: bool = False) -> float | None:
    """1.0 right, 0.0 wrong or no answer, None undecided. The gold may be given boxed."""
    return grade_many([response], [gold], lenient=lenient)[0]


def grade_many(responses, golds, *, lenient: bool = False) -> list[float | None]:
    """`grade` for each pair, in order. Samples of one problem repeat answers: compared once."""
    verdicts: dict[tuple[str, str], bool | None] = {}
    grades = []
    for response, gold in zip(responses, golds, strict=True):
        answer = extract(response, lenient=lenient)
        if answer is None:
            grades.append(0.0)
            continue
        pair = answer, _last_box(gold) or gold
        if pair not in verdicts:
            verdicts[pair] = equal(*pair)
        grades.append(None if verdicts[pair] is None else float(verdicts[pair]))
    return grades
