"""The catalogue's faults in code that shares nothing with ours: in HF's modules, and in mlx-lm's own definition."""

from .in_hf import IN_HF, Carried
from .in_stock import IN_STOCK, CarriedToStock, write_stock
from .not_carried import NOT_CARRIED

__all__ = ["IN_HF", "IN_STOCK", "NOT_CARRIED", "Carried", "CarriedToStock", "write_stock"]
