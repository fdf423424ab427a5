# docker build -t vramplan . && docker run --rm -p 8000:8000 vramplan
FROM python:3.11-slim

# A package index that holds CPU builds of torch makes the image smaller; empty: whatever pip is set up with.
ARG TORCH_INDEX=

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
WORKDIR /srv
COPY requirements.lock ./
RUN torch="$(grep '^torch==' requirements.lock)" \
    && pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$torch" \
    && pip install -r requirements.lock
COPY pyproject.toml README.md ./
COPY app ./app
COPY templates ./templates
COPY static ./static
RUN pip install --no-deps -e . && useradd --create-home planner
USER planner

EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=20s \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=4)"]
CMD ["vramplan", "serve", "--host", "0.0.0.0", "--port", "8000"]
