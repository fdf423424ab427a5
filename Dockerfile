FROM python:3.11-slim

# A package index that holds CPU builds of torch makes the image smaller; empty: whatever pip is set up with.
ARG TORCH_INDEX=

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
WORKDIR /build
COPY requirements-core.lock requirements.lock requirements-nodeps.lock ./
RUN grep -v '^-r' requirements.lock > pins.lock \
    && pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$(grep '^torch==' pins.lock)" \
    && pip install -r requirements-core.lock -c pins.lock
COPY pyproject.toml README.md LICENSE ./
COPY app ./app
COPY templates ./templates
COPY static ./static
RUN pip install -c requirements-core.lock -c pins.lock ".[trace]" \
    && pip install --no-deps -r requirements-nodeps.lock && rm -rf /build
RUN useradd --create-home planner
USER planner
WORKDIR /home/planner

EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=20s \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=4)"]
CMD ["vramplan", "serve", "--host", "0.0.0.0", "--port", "8000"]
