"""High-precision binomial and normal numbers for the unit tests of src/stats.

    pip install mpmath && python scripts/golden/binomial.py      # writes tests/golden/binomial.json

Every number is computed with 60 digits and written with 20; nothing here uses floating point on the way.
"""
import json
import pathlib

import mpmath
from mpmath import mp

mp.dps = 60
OUT = pathlib.Path(__file__).resolve().parents[2] / "tests/golden/binomial.json"


class Number(float):
    """A float literal written with 20 digits."""

    def __new__(cls, x):
        self = super().__new__(cls, x)
        self.text = mp.nstr(x, 20, min_fixed=0, max_fixed=0)
        return self

    def __repr__(self):
        return self.text


def tail(k, n, p, q):
    """P(X >= k) for X ~ Binomial(n, p), q = 1 - p: the leading term times a sum of ratios."""
    if k == 0:
        return mp.mpf(1)
    if k < n * p:
        return 1 - tail(n - k + 1, n, q, p)
    ln = mp.loggamma(n + 1) - mp.loggamma(k + 1) - mp.loggamma(n - k + 1) + k * mp.log(p) + (n - k) * mp.log(q)
    term = total = mp.mpf(1)
    for j in range(k, n):
        term = term * (n - j) / (j + 1) * p / q
        total += term
        if term < total * mp.mpf(10) ** -45:
            break
    return mp.exp(ln) * total


def lower(k, n, alpha):
    """The p with P(X >= k) = alpha, by Newton on the logarithm of the tail in the log-odds (safeguarded)."""
    if k == n:
        p = mp.power(alpha, mp.mpf(1) / n)
        return p, -mp.expm1(mp.log(alpha) / n)
    lo, hi = mp.mpf(-60), mp.mpf(60)
    t = mp.log(mp.mpf(k) / (n - k + 1))
    for _ in range(300):
        p, q = 1 / (1 + mp.exp(-t)), 1 / (1 + mp.exp(t))
        value = tail(k, n, p, q)
        if value > alpha:
            hi = t
        else:
            lo = t
        pmf = mp.exp(mp.loggamma(n + 1) - mp.loggamma(k + 1) - mp.loggamma(n - k + 1) + k * mp.log(p) + (n - k) * mp.log(q))
        step = (mp.log(alpha) - mp.log(value)) / (k * q * pmf / value)
        new = t + step
        if not lo < new < hi:
            new = (lo + hi) / 2
        if abs(new - t) < mp.mpf(10) ** -35:
            t = new
            break
        t = new
    return 1 / (1 + mp.exp(-t)), 1 / (1 + mp.exp(t))


def counts(n):
    half = n // 2
    picks = {1, 2, 3, n // 10, half - 1, half, half + 1, half + n // 20, 3 * n // 4, 9 * n // 10, n - n // 100, n - 2, n - 1, n}
    return sorted(k for k in picks if 1 <= k <= n)


def double(x):
    return mp.mpf(float(x))


rows = []
for n in (1, 2, 10, 100, 1000, 100_000, 10_000_000):
    for alpha in (1e-6, 0.001, 0.05) if n > 1000 else (1e-6, 0.0001, 0.001, 0.01, 0.05, 0.5, 0.75, 0.999):
        for k in counts(n):
            p, q = lower(k, n, double(alpha))
            rows.append({"count": k, "n": n, "alpha": alpha, "p": Number(p), "q": Number(q)})

tails = []
for n, p in ((5, 0.25), (100, 0.5), (100, 0.9375), (1000, 0.5), (10_000, 0.125), (1_000_000, 0.5), (10_000_000, 0.75)):
    mean, deviation = n * p, (n * p * (1 - p)) ** 0.5
    for z in (-6, -3, -1, -0.1, 0, 0.1, 1, 3, 6):
        k = round(mean + z * deviation)
        if 0 < k <= n:
            tails.append({"count": k, "n": n, "p": p, "q": 1 - p, "tail": Number(tail(k, n, mp.mpf(p), 1 - mp.mpf(p)))})

two_sided = []
for first, second in ((1, 0), (10, 0), (11, 0), (8, 3), (60, 40), (61, 59), (66, 60), (500, 400), (900, 20), (5200, 4800), (600_000, 598_000)):
    p = min(mp.mpf(1), 2 * tail(first, first + second, mp.mpf(0.5), mp.mpf(0.5)))
    two_sided.append({"first": first, "second": second, "p": Number(p)})


def quantile(p, q):
    small = min(p, q)
    x = mp.sqrt(2) * mp.erfinv(1 - 2 * small) if small > mp.mpf("1e-20") else mp.findroot(lambda z: mp.log(mp.erfc(z / mp.sqrt(2)) / 2) - mp.log(small), mp.sqrt(-2 * mp.log(small)))
    return x if q < p else -x


normal = []
for small in (0.5, 0.4999999999, 0.499, 0.45, 0.3, 0.25, 0.1, 0.05, 0.0201, 0.02, 0.0199, 0.01, 0.001, 1e-5, 6.9e-7, 1e-9, 1e-12, 1e-16, 1e-100, 1e-300):
    exact = double(small)
    for p, q in ((exact, 1 - exact), (1 - exact, exact)):
        x = quantile(p, q)
        normal.append({"p": Number(p), "q": Number(q), "x": Number(x) if x else 0.0})

distribution = []
for x in (-30.0, -8.0, -3.5, -2.0, -1.999, -0.5, -1e-5, 0.0, 0.3, 1.0, 1.99, 2.0, 2.5, 5.0, 12.0):
    exact = mp.mpf(x)
    p, q = mp.erfc(-exact / mp.sqrt(2)) / 2, mp.erfc(exact / mp.sqrt(2)) / 2
    distribution.append({"x": x, "p": Number(p), "q": Number(q)})

table = {"made_by": "scripts/golden/binomial.py", "mpmath": mpmath.__version__, "digits": mp.dps,
         "lower_bound": rows, "upper_tail": tails, "two_sided": two_sided, "normal": normal, "normal_distribution": distribution}


def encode(value):
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(k)}:{encode(v)}" for k, v in value.items()) + "}"
    return value.text if isinstance(value, Number) else json.dumps(value)


parts = []
for key, value in table.items():
    body = "[\n" + ",\n".join(encode(row) for row in value) + "\n]" if isinstance(value, list) else json.dumps(value)
    parts.append(f"{json.dumps(key)}:{body}")
OUT.parent.mkdir(parents=True, exist_ok=True)
OUT.write_text("{" + ",\n".join(parts) + "}\n")
print(len(rows), "bounds,", len(tails), "tails")
