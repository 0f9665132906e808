"""Thin adapters for other people's training loops, each in a module of its own that imports its library.

Every one of them calls :meth:`gradmark.Marker.penalty` and adds what it says to the loss, once a batch;
``examples/`` shows each at work. Nothing here is imported by gradmark itself.
"""
