"""What all connections with streams have in common."""

import pytest
import torch
from site_networks import filled_sites, initial_sites, linear_sublayers, run_sites, site_config, wave

from hf_depthattn.depth_state import DepthState

CONNECTIONS = ("hyper_connections", "mhc", "mhc_lite")
every_connection = pytest.mark.parametrize("connection", CONNECTIONS)
D = 8


@every_connection
def test_the_state_between_sublayers_is_one_tensor(connection):
    sites = filled_sites(site_config(D, 2, connection=connection, num_streams=3))
    state = sites[0].begin(wave(2, 5, D))
    for site in sites[:-1]:
        assert state._replace(partial=None) == DepthState(sources=(), partial=None)
        assert state.partial.shape == (2, 5, 3, D)
        h, state, weights = site(state)
        assert h.shape == (2, 5, D) and weights is None
        state = site.write(state, h)
    assert state.write_weights is None


@every_connection
def test_autocast_changes_nothing_but_the_sublayers(connection):
    """Weights and sums are float32 under autocast, and streams keep the dtype of the embedding."""
    sites = filled_sites(site_config(D, 2, connection=connection)).float()
    sublayers = [lambda h: h.sin().bfloat16()] * 4
    embeddings = wave(2, 5, D).float()
    expected = run_sites(sites, sublayers, embeddings)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = run_sites(sites, sublayers, embeddings)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)


@every_connection
def test_bfloat16_streams_are_rounded_once_per_read_and_write(connection):
    sites = filled_sites(site_config(D, 1, connection=connection)).float()
    streams = wave(2, 5, 4, D).bfloat16()
    state = sites[0].begin(wave(2, 5, D).bfloat16())._replace(partial=streams)
    exact = state._replace(partial=streams.float())
    (h, state, _), (exact_h, exact, _) = sites[0](state), sites[0](exact)
    assert torch.equal(h, exact_h.bfloat16()) and torch.equal(state.partial, exact.partial.bfloat16())
    y = wave(2, 5, D, phase=1.0).bfloat16()
    exact = exact._replace(partial=state.partial.float())
    written, exact = sites[0].write(state, y), sites[0].write(exact, y.float())
    assert torch.equal(written.partial, exact.partial.bfloat16())


@every_connection
def test_streams_become_different_within_a_few_steps(connection):
    """They are equal at the start, and remain equal for ever where reads have equal weights."""
    sites = initial_sites(site_config(D, 3, connection=connection)).double()
    sublayers = linear_sublayers(D, 6)
    optimizer = torch.optim.SGD(sites.parameters(), lr=1.0)
    for _ in range(5):
        optimizer.zero_grad()
        run_sites(sites, sublayers, wave(2, 3, D)).square().mean().backward()
        optimizer.step()
    state = sites[0].begin(wave(2, 3, D))
    for site, sublayer in zip(sites, sublayers, strict=False):
        h, state, _ = site(state)
        state = site.write(state, sublayer(h))
    assert state.partial.std(-2).mean() > 1e-3 * state.partial.abs().mean()
