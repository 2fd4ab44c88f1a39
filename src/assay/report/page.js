"use strict";
(() => {
  const palette = JSON.parse(document.getElementById("palette").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const figures = [...document.querySelectorAll(".chart")].map((box) => ({
    box,
    spec: JSON.parse(document.getElementById(box.dataset.spec).textContent),
    drawn: "",
    view: null,
  }));
  let printing = false;

  // Swap every colour of the light palette for its dark twin, in the specification but never in the data.
  const recolour = (part) => {
    if (typeof part === "string") return palette[part] ?? part;
    if (Array.isArray(part)) return part.map(recolour);
    if (part === null || typeof part !== "object") return part;
    return Object.fromEntries(
      Object.entries(part).map(([key, value]) => [key, key === "datasets" || key === "data" ? value : recolour(value)]),
    );
  };

  // The categories of the picture's longest legend.
  const categories = (part) => {
    if (part === null || typeof part !== "object") return [];
    const named = Array.isArray(part.color?.scale?.domain) ? part.color.scale.domain.map(String) : [];
    const inside = Object.entries(part).map(([key, value]) => (key === "datasets" ? [] : categories(value)));
    return inside.reduce((most, next) => (next.length > most.length ? next : most), named);
  };

  // Give a picture the width of its box: single pictures exactly, small multiples in as many columns as are readable.
  const fit = (spec, width, square) => {
    const room = width - 110;
    const named = categories(spec);
    const fitting = Math.max(1, Math.floor(room / (30 + 6.6 * Math.min(33, Math.max(0, ...named.map((name) => name.length))))));
    const columns = Math.max(1, Math.ceil(named.length / Math.ceil(named.length / fitting || 1)));
    const rows = {
      ...spec,
      config: {
        ...spec.config,
        axis: { ...spec.config?.axis, labelLimit: Math.max(90, Math.min(260, width * 0.4)) },
        legend: { ...spec.config?.legend, columns, labelLimit: Math.min(220, room) },
      },
    };
    if (spec.facet && spec.spec) {
      const most = Math.max(1, Math.min(spec.columns ?? 3, Math.floor(width / 230)));
      const count = spec.facet.sort?.length ?? most;
      const columns = Math.max(1, Math.ceil(count / Math.ceil(count / most)));
      const gap = spec.spacing?.column ?? spec.spacing ?? 20;
      return { ...rows, columns, spec: { ...spec.spec, width: Math.max(120, Math.floor((width - 64 - (columns - 1) * gap) / columns)) } };
    }
    const many = spec.concat ?? spec.hconcat;
    if (many) {
      const columns = Math.max(1, Math.min(spec.columns ?? many.length, Math.floor(width / 260)));
      const { hconcat, ...rest } = rows;
      const each = Math.max(120, Math.floor(width / columns) - 72);
      return { ...rest, columns, concat: many.map((part) => ({ ...part, width: each })) };
    }
    if (spec.vconcat) return { ...rows, vconcat: spec.vconcat.map((part) => ({ ...part, width: Math.max(120, width - 72) })) };
    const height = square ? Math.min(width - 40, 420) : spec.height;
    return { ...rows, width, height, autosize: { type: "fit-x", contains: "padding" } };
  };

  const tip = document.createElement("div");
  tip.id = "tip";
  tip.hidden = true;
  document.body.append(tip);
  const say = (value) => (value === null || value === undefined || value === "" || value === "null" || value === "NaN" ? "–" : String(value));
  // Text nodes only: nothing from data is ever read as HTML.
  const tooltip = (handler, event, item, value) => {
    if (value === null || value === undefined || value === "") {
      tip.hidden = true;
      return;
    }
    if (typeof value === "object") {
      const list = document.createElement("dl");
      for (const [name, entry] of Object.entries(value)) {
        const term = document.createElement("dt");
        const detail = document.createElement("dd");
        term.textContent = name;
        detail.textContent = say(entry);
        list.append(term, detail);
      }
      tip.replaceChildren(list);
    } else {
      tip.textContent = say(value);
    }
    tip.hidden = false;
    const { clientX, clientY } = event.touches?.[0] ?? event;
    const { width, height } = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(8, Math.min(clientX + 14, innerWidth - width - 8))}px`;
    tip.style.top = `${clientY + 18 + height > innerHeight ? Math.max(8, clientY - height - 12) : clientY + 18}px`;
  };
  const refuse = () => Promise.reject(new Error("a report loads nothing"));

  const draw = async (figure) => {
    const width = Math.floor(figure.box.getBoundingClientRect().width);
    const night = dark.matches && !printing;
    const wanted = `${width} ${night}`;
    if (!width || figure.drawn === wanted) return;
    figure.drawn = wanted;
    figure.box.style.minHeight ||= `${(figure.spec.height ?? 240) + 50}px`;
    try {
      const spec = fit(night ? recolour(figure.spec) : figure.spec, width, "square" in figure.box.dataset);
      const result = await vegaEmbed(figure.box, spec, {
        mode: "vega-lite",
        renderer: "svg",
        actions: false,
        ast: true,
        defaultStyle: false,
        tooltip,
        loader: { load: refuse, sanitize: refuse },
        logLevel: 1,
      });
      figure.view?.finalize();
      figure.view = result;
      figure.box.classList.add("ready");
    } catch (error) {
      figure.box.classList.add("failed");
      figure.box.textContent = `This picture could not be drawn: ${error.message}`;
      console.error(error);
    }
  };

  const near = new IntersectionObserver(
    (entries) => {
      for (const entry of entries) {
        const figure = figures.find(({ box }) => box === entry.target);
        figure.near = entry.isIntersecting;
        if (figure.near) draw(figure);
      }
    },
    { rootMargin: "600px" },
  );
  let waiting = 0;
  const redraw = () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => figures.filter((figure) => figure.near).forEach(draw), 120);
  };
  const resized = new ResizeObserver(redraw);
  for (const figure of figures) {
    near.observe(figure.box);
    resized.observe(figure.box);
  }
  dark.addEventListener("change", redraw);
  addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });
  addEventListener("keydown", (event) => { if (event.key === "Escape") tip.hidden = true; });
  addEventListener("beforeprint", () => { printing = true; figures.forEach(draw); });
  addEventListener("afterprint", () => { printing = false; redraw(); });
})();
