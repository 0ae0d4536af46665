"""Conditions and seeds to images in a folder.

`job` says what, `run` divides the work, `worker` does it, `pipeline` makes the images, `store` keeps them and reads
them back, `cluster` runs workers on Ray, `export` writes for others.
"""
