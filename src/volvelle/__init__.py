"""Volvelle: deep-learning papers as parts you import, systems you run and claims you re-measure.

>>> import volvelle
>>> volvelle.__version__
'0.1.0'
"""

__version__ = "0.1.0"
