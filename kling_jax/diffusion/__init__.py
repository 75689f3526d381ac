"""Diffusion as pure functions on arrays: process, time, loss, sampler, guidance; no network, no file, no mesh."""
