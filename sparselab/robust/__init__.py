"""Bounds, attacks, neuron stability and verification of any network that can be read."""
