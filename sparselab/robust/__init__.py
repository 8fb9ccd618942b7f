"""Bounds, attacks, neuron stability and verification of any traced network."""
