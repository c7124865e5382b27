"""A pretrained model that skips: maps and routers fitted in closed form, then distilled."""

from midskip.retrofit.run import RetrofitSettings, retrofit

__all__ = ["RetrofitSettings", "retrofit"]
