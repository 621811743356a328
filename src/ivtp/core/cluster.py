"""Clusters of tokens by density peaks (Du et al., 2016: DPC-KNN)."""

from __future__ import annotations

import torch
from torch import Tensor


def density_peaks(tokens: Tensor, clusters: int, neighbours: int) -> tuple[Tensor, Tensor]:
    """Cluster centres (B, clusters) of `tokens` (B, N, D) and the cluster (B, N) that each token is in.

    A token's density is exp(-mean squared distance) to its `neighbours` nearest (itself among them), distances in
    units of sqrt(D); its delta the distance to the nearest denser one (of equal ones the lower index is the denser),
    or for the densest the largest distance of all. The centres have the highest product of both; a token joins the
    nearest centre, a centre its own.
    """
    batch, count, width = tokens.shape
    exact = "donot_use_mm_for_euclid_dist"  # products lose the small distances of tokens far from the origin
    distance = torch.cdist(tokens.float(), tokens.float(), compute_mode=exact) / width**0.5  # (B, N, N)
    near = distance.topk(min(neighbours, count), dim=2, largest=False).values
    density = (-near.square().mean(dim=2)).exp()  # (B, N)
    order = torch.arange(count, device=tokens.device)
    denser = (density.unsqueeze(1) > density.unsqueeze(2)) | (
        (density.unsqueeze(1) == density.unsqueeze(2)) & (order < order[:, None])  # of equals the first is the denser
    )
    largest = distance.flatten(1).amax(dim=1)[:, None, None]
    delta = torch.where(denser, distance, largest).amin(dim=2)
    centres = (density * delta).argsort(dim=1, descending=True, stable=True)[:, :clusters]
    rows = torch.arange(batch, device=tokens.device)[:, None]
    member = distance[rows, centres].argmin(dim=1)  # (B, N)
    own = torch.arange(clusters, device=tokens.device).expand(batch, -1)
    return centres, member.scatter(1, centres, own)


def cluster_means(tokens: Tensor, member: Tensor, clusters: int) -> Tensor:
    """Mean of each cluster's `tokens` (B, N, D): (B, clusters, D)."""
    goes = torch.nn.functional.one_hot(member, clusters).to(tokens.dtype)  # (B, N, clusters)
    return goes.transpose(1, 2) @ tokens / goes.sum(dim=1).unsqueeze(-1)
