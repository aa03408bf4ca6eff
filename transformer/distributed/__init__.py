"""Meshes of devices, sharding rules, several processes."""
