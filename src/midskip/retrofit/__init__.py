"""A pretrained model that skips: maps and routers fitted in closed form, then distilled."""

from midskip.retrofit.run import retrofit
from midskip.retrofit.settings import RetrofitSettings

__all__ = ["RetrofitSettings", "retrofit"]
