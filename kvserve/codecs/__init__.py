"""Codecs: how one tile of keys or values is written and read. They need torch alone, and import nothing of kvserve."""
