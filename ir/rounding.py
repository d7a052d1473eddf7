"""Rounding: the codes and scales of a weight, to nearest or with the error of the layer's output (GPTQ, 2210.17323, and descent)."""

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ir import numerics
from ir.encoding import Encoding
from ir.errors import DataError, OptionError
from ir.numerics import QParams

RATIOS = tuple(1.0 - 0.025 * i for i in range(25))


class Rounding(Protocol):
    def round_weight(self, W: Tensor, encoding: Encoding, gram: Tensor | None = None) -> tuple[Tensor, QParams]: ...


def objective(W: Tensor, codes: Tensor, qparams: QParams, encoding: Encoding, gram: Tensor) -> Tensor:
    D = W.double() - numerics.dequantize(codes, qparams, encoding, torch.float64)
    return (D @ gram.double() * D).sum(-1)


def search_qparams(W, encoding, importance=None, ratios=RATIOS, scale_dtype=torch.float16, two=False):
    best = numerics.choose_qparams(W, encoding, scale_dtype)
    split, axes = numerics.blocked(W, encoding)
    low, high = split.amin(axes).clamp_max(0), split.amax(axes).clamp_min(0)
    least = None
    cands = [(a, b) for a in ratios for b in ratios if two or a == b]
    for a, b in cands:
        if encoding.symmetric:
            cand = QParams((best0_scale(W, encoding) * a).clamp(numerics.TINY_HALF, 65504.0).to(scale_dtype))
        else:
            cand = numerics.qparams_from_range(low * a, high * b, encoding, scale_dtype)
        e = (W - numerics.fake_quantize(W, encoding, cand)).square()
        if importance is not None:
            e = e * importance
        err = numerics.blocked(e, encoding)[0].sum(axes)
        if least is None:
            least, scale, zero = err, cand.scale, cand.zero_point
        else:
            better = err < least
            least = torch.where(better, err, least)
            scale = torch.where(better, cand.scale, scale)
            zero = None if zero is None else torch.where(better, cand.zero_point, zero)
    return QParams(scale, zero)


def best0_scale(W, encoding):
    return numerics.choose_qparams(W, encoding).scale


def damped(gram: Tensor, damping: float) -> Tensor:
    H = gram.double().clone()
    d = H.diagonal()
    m = d.mean()
    dead = d == 0
    d[dead] = m if m > 0 else 1.0
    d += damping * m
    return H


def inverse_factor(H):
    L, info = torch.linalg.cholesky_ex(H.flip(0, 1))
    if info.item():
        raise RuntimeError
    R = L.flip(0, 1)
    eye = torch.eye(len(H), dtype=H.dtype)
    return torch.linalg.solve_triangular(R, eye, upper=True)


@dataclass(frozen=True)
class Nearest:
    search: bool = False
    ratios: tuple = RATIOS
    two: bool = False

    def round_weight(self, W, encoding, gram=None):
        W = W.float()
        if self.search:
            qp = search_qparams(W, encoding, None if gram is None else gram.diagonal().float(), self.ratios, two=self.two)
        else:
            qp = numerics.choose_qparams(W, encoding, torch.float16)
        return numerics.quantize(W, qp, encoding), qp


@dataclass(frozen=True)
class GPTQ:
    damping: float = 0.01
    act_order: bool = False
    block: int = 128
    search: bool = True
    two: bool = False
    weight: str = "cond"  # diag, cond, none
    ratios: tuple = RATIOS
    sweeps: int = 0
    refit: bool = True
    shift: bool = False

    def round_weight(self, W, encoding, gram=None):
        W = W.float()
        N, K = W.shape
        g = encoding.block_shape((N, K))[1]
        H = damped(gram, self.damping)
        order = H.diagonal().argsort(descending=True) if self.act_order else torch.arange(K)
        U = inverse_factor(H[order][:, order]).float()
        if self.weight == "cond":
            imp = U.diagonal() ** -2
        elif self.weight == "diag":
            imp = H.diagonal()[order].float()
        else:
            imp = torch.ones(K)
        V = W.T[order].contiguous()
        elem = replace(encoding, block=(1,))
        R, G = encoding.scale_shape((N, K))
        scale = torch.empty(R, G, dtype=torch.float16)
        zero = torch.empty(R, G, dtype=torch.uint8)

        def choose(X, im):
            if self.search:
                return search_qparams(X, encoding, im, self.ratios, two=self.two)
            return numerics.choose_qparams(X, encoding, torch.float16)

        if self.act_order:
            back = torch.empty_like(imp)
            back[order] = imp
            qp = choose(W, back)
            scale = qp.scale
            zero = qp.zero_point if qp.zero_point is not None else zero
        codes = torch.empty(K, N, dtype=numerics.storage_dtype(encoding))
        step = self.block // g * g if g <= self.block else self.block
        starts = list(range(0, K, step)) if g <= self.block else [s for a in range(0, K, g) for s in range(a, min(a + g, K), step)]
        for i, end in zip(starts, starts[1:] + [K], strict=True):
            E = torch.empty(end - i, N)
            for j in range(i, end):
                c = int(order[j])
                k = c // g
                if not self.act_order and j % g == 0:
                    qp = choose(V[j : j + g].T, imp[j : j + g])
                    scale[:, k : k + 1] = qp.scale
                    if qp.zero_point is not None:
                        zero[:, k : k + 1] = qp.zero_point
                qc = column(QParams(scale, None if encoding.symmetric else zero), k, encoding, N)
                q = numerics.quantize(V[j], qc, elem)
                codes[c] = q
                e = (V[j] - numerics.dequantize(q, qc, elem)) / U[j, j]
                E[j - i] = e
                if j + 1 < end:
                    V[j + 1 : end].addr_(U[j, j + 1 : end], e, alpha=-1)
            V[end:].addmm_(U[i:end, end:].T, E, alpha=-1)
        qp = QParams(scale, None if encoding.symmetric else zero)
        if self.sweeps:
            codes, qp = descend(W.T.contiguous(), codes, qp, encoding, H.float(), self.sweeps, self.refit, self.shift)
        return codes.T.contiguous(), qp


def column(qp, k, encoding, N):
    f = lambda t: numerics.expand(t[:, k : k + 1], encoding, (N, 1))[:, 0]
    return QParams(f(qp.scale), None if qp.zero_point is None else f(qp.zero_point))


def descend(V, codes, qp, encoding, H, sweeps, refit=True, shift=False):
    K, N = V.shape
    g = encoding.block_shape((N, K))[1]
    r = encoding.block_shape((N, K))[0]
    elem = replace(encoding, block=(1,))
    scale = qp.scale.clone()
    zero = None if qp.zero_point is None else qp.zero_point.clone()
    qp = QParams(scale, zero)
    hat = numerics.dequantize(codes.T, qp, encoding).T.contiguous()
    d = H.diagonal()
    lo, hi = numerics.code_range(encoding)
    for _ in range(sweeps):
        P = H @ (V - hat)
        for k, i in enumerate(range(0, K, g)):
            end = min(i + g, K)
            old = hat[i:end].clone()
            Pg = P[i:end]
            Hg = H[i:end, i:end]
            qc = column(qp, k, encoding, N)
            for j in range(i, end):
                target = hat[j] + Pg[j - i] / d[j]
                q = numerics.quantize(target, qc, elem)
                new = numerics.dequantize(q, qc, elem)
                Pg.addr_(Hg[j - i], new - hat[j], alpha=-1)
                codes[j], hat[j] = q, new
            if refit:
                x = codes[i:end].float() - (0 if zero is None else qc.zero_point.float())
                num = (x * Pg).sum(0)
                den = (x * (Hg @ x)).sum(0)
                rows = torch.arange(N) // r
                z = torch.zeros(scale.shape[0])
                num, den = z.index_add(0, rows, num), z.index_add(0, rows, den)
                s = scale[:, k].float()
                ns = torch.where(den > 0, s + num / den.clamp_min(1e-30), s)
                ns = ns.clamp(numerics.TINY_HALF, 65504.0).to(torch.float16)
                scale[:, k] = ns
                new = x * column(qp, k, encoding, N).scale.float()
                Pg -= Hg @ (new - hat[i:end])
                hat[i:end] = new
            if shift and zero is not None:
                # hat = s (q - z); dz: hat -= s dz
                s = scale[:, k].float()
                rows = torch.arange(N) // r
                z0 = torch.zeros(scale.shape[0])
                num = z0.index_add(0, rows, Pg.sum(0))
                den = z0.index_add(0, rows, Hg.sum() * torch.ones(N))
                dz = -(num / (den * s)).round()
                nz = (zero[:, k].float() + dz).clamp(lo, hi)
                zero[:, k] = nz.to(torch.uint8)
                qc = column(qp, k, encoding, N)
                new = (codes[i:end].float() - qc.zero_point.float()) * qc.scale.float()
                Pg -= Hg @ (new - hat[i:end])
                hat[i:end] = new
            D = hat[i:end] - old
            P[:i] -= H[:i, i:end] @ D
            P[end:] -= H[end:, i:end] @ D
    return codes, qp


def correct(W, gram, cross, strength=1.0, damping=0.01):
    H = damped(gram, damping)
    return (W.double() + strength * W.double() @ torch.linalg.solve(H, (cross - gram).double().T).T).float()
