const data = JSON.parse(document.getElementById("report-data").textContent);
const root = document.documentElement;
const toggle = document.getElementById("theme-toggle");
const slider = document.getElementById("layer-slider");
const views = new Map();

function theme() {
  return root.dataset.theme;
}

// On a phone, legend entries do not fit side by side.
function configFor(place) {
  const config = data.themes[theme()];
  if (place.clientWidth >= 480) {
    return config;
  }
  return { ...config, legend: { ...config.legend, columns: 1 } };
}

async function draw(id) {
  const place = document.getElementById(id);
  place.dataset.state = "drawing";
  const drawnIn = theme();
  const result = await vegaEmbed(place, data.specs[id], {
    actions: false,
    renderer: "svg",
    config: configFor(place),
    tooltip: { theme: drawnIn },
  });
  views.get(id)?.finalize();
  views.set(id, result.view);
  if (data.layerPanels.includes(id)) {
    await result.view.signal("layer", Number(slider.value)).runAsync();
  }
  // The theme may have changed while the chart was drawn.
  if (drawnIn !== theme()) {
    return draw(id);
  }
  place.dataset.state = "drawn";
}

function setTheme(name) {
  root.dataset.theme = name;
  toggle.textContent = name === "dark" ? "Light" : "Dark";
  // A chart that is still being drawn checks the theme when it is done.
  for (const id of views.keys()) {
    if (document.getElementById(id).dataset.state === "drawn") {
      draw(id);
    }
  }
}

function cell(tag, text, row) {
  const element = document.createElement(tag);
  element.textContent = text;
  row.append(element);
  return element;
}

function showLayer() {
  const layer = Number(slider.value);
  document.getElementById("layer-shown").textContent = layer;
  for (const id of data.layerPanels) {
    views.get(id)?.signal("layer", layer).runAsync();
  }
  const table = document.getElementById("layer-numbers");
  table.replaceChildren();
  const head = table.createTHead().insertRow();
  cell("td", `layer ${layer}`, head);
  for (const model of data.models) {
    cell("th", model, head).scope = "col";
  }
  const body = table.createTBody();
  for (const line of data.layerNumbers) {
    const row = body.insertRow();
    cell("th", line.title, row).scope = "row";
    for (const values of line.values) {
      cell("td", values[layer] ?? "–", row);
    }
  }
}

const preferred = window.matchMedia("(prefers-color-scheme: dark)");
setTheme(preferred.matches ? "dark" : "light");
preferred.addEventListener("change", (event) => setTheme(event.matches ? "dark" : "light"));
toggle.addEventListener("click", () => setTheme(theme() === "dark" ? "light" : "dark"));
slider.addEventListener("input", showLayer);
showLayer();

// Draw charts only when they come near the screen, since drawing all of them takes seconds on a phone.
function drawOnce(id) {
  if (!document.getElementById(id).dataset.state) {
    draw(id);
  }
}

const watcher = new IntersectionObserver(
  (entries) => {
    for (const entry of entries) {
      if (entry.isIntersecting) {
        watcher.unobserve(entry.target);
        drawOnce(entry.target.id);
      }
    }
  },
  { rootMargin: "800px" },
);
for (const id of Object.keys(data.specs)) {
  watcher.observe(document.getElementById(id));
}
window.addEventListener("beforeprint", () => {
  Object.keys(data.specs).forEach(drawOnce);
});
