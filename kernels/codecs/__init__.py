"""Device functions of the codecs, a file per kind (kvserve/codecs/ says what each one stores).

Each file has a `...Stage`, which is what the kernels know of the codec at compile time, and reads and writes its own
sections. `chain` puts the codecs of a half together. A kind that is no wrapper has `..._rows`, which reads a chunk of
tokens as float32 [CHUNK, block_dim], 0 from head_dim on, and `encode_...`, which writes a tile and returns it as it
will be read. `S` is the stage, `G` the Geometry.
"""
