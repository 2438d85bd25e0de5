"""Active, semi-supervised instance segmentation: the learning core.

Knows no Label Studio, HTTP, SQL or environment variables; works on images, COCO files and arrays.
"""
