"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const dataOf = (id) => JSON.parse(byId(id).textContent);

  function make(tag, className, text) {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  }

  // Theme and plots -----------------------------------------------------

  const systemDark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (document.documentElement.dataset.theme || (systemDark.matches ? "dark" : "light")) === "dark";

  const figures = dataOf("plots");
  const drawn = new Set();
  const probe = document.body.appendChild(make("span"));
  probe.hidden = true;

  // A custom property's own value still says light-dark(...); that of a colour is resolved
  function cssColor(name) {
    probe.style.color = `var(${name})`;
    return getComputedStyle(probe).color;
  }

  function themed(value) {
    if (typeof value === "string") {
      const name = /^var\((--[\w-]+)\)$/.exec(value);
      return name ? cssColor(name[1]) : value;
    }
    if (Array.isArray(value)) return value.map(themed);
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, themed(item)]));
    }
    return value;
  }

  // Plotly's source lies in the page as text, so that opening it doesn't wait for five megabytes of script
  function loadPlotly() {
    const source = byId("plotly");
    if (!source) return;
    const script = make("script");
    script.textContent = source.textContent;
    document.head.append(script);
    source.remove();
  }

  function draw(id) {
    loadPlotly();
    const figure = themed(figures[id]);
    // Where there is no mouse a finger scrolls the page, not the plot
    figure.layout.dragmode = matchMedia("(hover: hover)").matches ? "zoom" : false;
    window.Plotly.react(byId(id), figure.data, figure.layout, { displayModeBar: false, responsive: true });
    drawn.add(id);
  }

  function showTheme() {
    byId("theme").textContent = isDark() ? "Light" : "Dark";
    byId("theme").setAttribute("aria-label", `${isDark() ? "Light" : "Dark"} theme`);
    drawn.forEach(draw);
  }

  byId("theme").addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    showTheme();
  });
  systemDark.addEventListener("change", showTheme);
  showTheme();

  const inView = new IntersectionObserver(
    (entries) => {
      for (const entry of entries) {
        if (entry.isIntersecting) {
          inView.unobserve(entry.target);
          setTimeout(draw, 0, entry.target.id); // one after another, the page answers between them
        }
      }
    },
    { rootMargin: "400px" }
  );
  const watchPlots = () => document.querySelectorAll(".plot").forEach((plot) => inView.observe(plot));
  addEventListener("load", () => setTimeout(watchPlots));

  // Samples during training ---------------------------------------------

  const webp = (base64) => `data:image/webp;base64,${base64}`;

  document.querySelectorAll(".grids").forEach((grid) => {
    const steps = JSON.parse(grid.dataset.steps);
    const images = grid.querySelector("script").textContent.split("\n");
    const slider = grid.querySelector("input");
    const [first, chosen] = grid.querySelectorAll("img");
    const put = (image, place) => {
      image.alt = `Samples of ${grid.dataset.stage} at step ${steps[place]}`;
      image.src = webp(images[place]);
    };
    const show = () => {
      grid.querySelector("output").textContent = steps[slider.value];
      slider.setAttribute("aria-valuetext", `step ${steps[slider.value]}`);
      put(chosen, slider.value);
    };
    put(first, 0);
    slider.hidden = chosen.hidden = steps.length < 2;
    slider.addEventListener("input", show);
    show();
  });

  // Pairs ---------------------------------------------------------------

  if (!byId("pairs-data")) return;

  const PAGE = matchMedia("(max-width: 40rem)").matches ? 8 : 24;
  const data = dataOf("pairs-data");
  const adapters = data.models.slice(1);
  const pairs = data.pairs.map(([prompt, steps, index, seed, scores], place) => ({
    place, steps, index, seed, scores, prompt: data.prompts[prompt], category: data.categories[prompt],
  }));
  const severalImages = pairs.some((pair) => pair.index > 0);
  const list = byId("list");
  const dialog = byId("large");
  const controls = Object.fromEntries(
    ["search", "steps", "adapter", "category", "metric", "outcome", "order"].map((id) => [id, byId(id)])
  );
  let found = []; // the pairs that are chosen, in their order
  let page = 0;
  let open = -1; // the place in `found` of the pair that is shown large

  const chunks = new Map();
  function imagesOf(pair) {
    const number = Math.floor(pair.place / data.chunk);
    if (!chunks.has(number)) chunks.set(number, byId(`images-${number}`).textContent.split("\n"));
    const start = (pair.place % data.chunk) * data.models.length;
    return chunks.get(number).slice(start, start + data.models.length);
  }

  function gain(pair, adapter) {
    const scores = pair.scores[controls.metric.value];
    return scores && scores[0] !== null && scores[adapter + 1] !== null ? scores[adapter + 1] - scores[0] : null;
  }
  const chosenGain = (pair) => gain(pair, Number(controls.adapter.value));
  const shortNumber = (value) => String(Number(value.toPrecision(3)));
  function gainText(value) {
    if (value === null) return "";
    if (value === 0) return "= 0";
    return value > 0 ? `▲ +${shortNumber(value)}` : `▼ ${shortNumber(value).replace("-", "−")}`;
  }

  function fill(control, options, isNeeded = options.length > 1) {
    control.replaceChildren(...options.map(([value, text]) => Object.assign(make("option", "", text), { value })));
    control.parentElement.hidden = !isNeeded;
  }
  const all = (values) => [["", "all"], ...values.map((value) => [value, value])];
  const steps = [...new Set(pairs.map((pair) => pair.steps))].sort((a, b) => a - b);
  const categories = [...new Set(data.categories.filter((category) => category !== null))].sort();
  fill(controls.steps, all(steps), steps.length > 1);
  controls.steps.value = steps.at(-1); // each prompt once
  fill(controls.adapter, adapters.map((name, place) => [place, name]));
  fill(controls.category, all(categories), categories.length > 0);
  fill(controls.metric, data.metrics.map((name, place) => [place, name]));
  if (!data.metrics.length) controls.outcome.parentElement.hidden = controls.order.parentElement.hidden = true;

  function update() {
    const text = controls.search.value.trim().toLowerCase();
    const { steps, category, outcome, order } = controls;
    const fitting = pairs.filter(
      (pair) =>
        (!text || pair.prompt.toLowerCase().includes(text)) &&
        (!steps.value || String(pair.steps) === steps.value) &&
        (!category.value || pair.category === category.value)
    );
    const signs = fitting.map((pair) => { const value = chosenGain(pair); return value === null ? null : Math.sign(value); });
    found = outcome.value ? fitting.filter((_, place) => signs[place] === Number(outcome.value)) : fitting;
    if (order.value) {
      const rank = (pair) => { const value = chosenGain(pair); return value === null ? Infinity : order.value * value; };
      found = [...found].sort((a, b) => rank(a) - rank(b) || a.place - b.place);
    }
    const count = (sign) => signs.filter((other) => other === sign).length;
    byId("count").textContent = data.metrics.length
      ? `${fitting.length} pairs: ${count(1)} wins, ${count(0)} ties, ${count(-1)} losses by ${data.metrics[controls.metric.value]}`
      : `${fitting.length} pairs`;
    showPage(0);
  }

  function showPage(number) {
    const last = Math.max(0, Math.ceil(found.length / PAGE) - 1);
    page = Math.min(Math.max(number, 0), last);
    list.replaceChildren(...found.slice(page * PAGE, (page + 1) * PAGE).map(pairItem));
    const from = found.length ? page * PAGE + 1 : 0;
    byId("page").textContent = `${from} to ${Math.min((page + 1) * PAGE, found.length)} of ${found.length}`;
    byId("earlier").disabled = page === 0;
    byId("later").disabled = page === last;
  }

  function factsOf(pair) {
    const parts = [`${pair.steps} steps`, pair.category, severalImages ? `image ${pair.index + 1}` : null, `seed ${pair.seed}`];
    return parts.filter((part) => part !== null).join(" · ");
  }

  // Base, then the adapters, each with its name and what it gained
  function imageRow(pair) {
    const sources = imagesOf(pair);
    return data.models.map((model, place) => {
      const column = make("span", "column");
      const image = make("img");
      image.alt = `${model}: ${pair.prompt}`;
      image.decoding = "async";
      image.addEventListener("load", () => image.classList.toggle("tiny", image.naturalWidth <= 64));
      if (sources[place]) image.src = webp(sources[place]);
      const label = make("span", "label");
      label.append(make("span", "", model));
      if (place) {
        const value = gain(pair, place - 1);
        label.append(make("span", value > 0 ? "win" : "", gainText(value)));
      }
      column.append(image, label);
      return column;
    });
  }

  function pairItem(pair) {
    const item = make("li");
    const button = make("button", "pair");
    button.type = "button";
    button.dataset.place = pair.place;
    const images = make("span", "images");
    images.append(...imageRow(pair));
    const prompt = make("span", "prompt", pair.prompt);
    prompt.dir = "auto";
    button.append(images, prompt, make("span", "facts", factsOf(pair)));
    button.addEventListener("click", () => showLarge(found.indexOf(pair)));
    item.append(button);
    return item;
  }

  function focusPair(place) {
    if (place < 0 || place >= found.length) return;
    if (Math.floor(place / PAGE) !== page) showPage(Math.floor(place / PAGE));
    list.children[place % PAGE].firstChild.focus();
  }
  function focused() {
    const button = document.activeElement.closest(".pair");
    return button ? page * PAGE + [...list.children].indexOf(button.parentElement) : -1;
  }
  const columns = () => getComputedStyle(list).gridTemplateColumns.split(" ").length;

  // The dialog

  function showLarge(place) {
    if (place < 0 || place >= found.length) return;
    open = place;
    const pair = found[place];
    byId("large-prompt").textContent = pair.prompt;
    byId("large-facts").textContent = factsOf(pair);
    byId("large-images").replaceChildren(...imageRow(pair));
    byId("previous").disabled = place === 0;
    byId("next").disabled = place === found.length - 1;
    if (!dialog.open) dialog.showModal();
  }

  function flip(isFlipped) {
    if (!dialog.open || dialog.classList.contains("flipped") === isFlipped) return;
    dialog.classList.toggle("flipped", isFlipped);
    const sources = imagesOf(found[open]);
    byId("large-images").querySelectorAll(".column").forEach((column, place) => {
      const shown = isFlipped ? 0 : place;
      column.querySelector("img").src = webp(sources[shown]);
      column.querySelector(".label span").textContent = data.models[shown];
    });
  }

  dialog.addEventListener("close", () => {
    dialog.classList.remove("flipped");
    focusPair(open);
  });
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  byId("close").addEventListener("click", () => dialog.close());
  byId("previous").addEventListener("click", () => showLarge(open - 1));
  byId("next").addEventListener("click", () => showLarge(open + 1));
  byId("flip").addEventListener("pointerdown", () => flip(true));
  for (const end of ["pointerup", "pointerleave", "pointercancel"]) byId("flip").addEventListener(end, () => flip(false));

  // Controls and keys

  controls.search.addEventListener("input", update);
  document.querySelectorAll(".controls select").forEach((select) => select.addEventListener("change", update));
  byId("earlier").addEventListener("click", () => turnTo(page - 1));
  byId("later").addEventListener("click", () => turnTo(page + 1));
  function turnTo(number) {
    showPage(number);
    byId("count").scrollIntoView({ block: "start" });
  }

  function onKeyWhenLarge(event) {
    const step = { j: 1, ArrowRight: 1, ArrowDown: 1, k: -1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (step) {
      flip(false);
      showLarge(open + step);
      event.preventDefault();
    }
    if (event.key === "f") flip(true);
  }

  function onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (dialog.open) return onKeyWhenLarge(event);
    const active = document.activeElement;
    if (active.matches("input, select")) {
      if (event.key === "Escape" && active === controls.search) active.blur();
      return;
    }
    // Keys of one letter belong to the pairs, where nothing else has the focus
    if (active !== document.body && !active.closest("#pairs")) return;
    const place = focused();
    if (event.key === "/") controls.search.focus();
    else if (event.key === "j") focusPair(place < 0 ? page * PAGE : place + 1);
    else if (event.key === "k") focusPair(place < 0 ? page * PAGE : place - 1);
    else if (place >= 0 && event.key === "ArrowRight") focusPair(place + 1);
    else if (place >= 0 && event.key === "ArrowLeft") focusPair(place - 1);
    else if (place >= 0 && event.key === "ArrowDown") focusPair(place + columns());
    else if (place >= 0 && event.key === "ArrowUp") focusPair(place - columns());
    else return;
    event.preventDefault();
  }
  document.addEventListener("keydown", onKey);
  document.addEventListener("keyup", (event) => { if (event.key === "f") flip(false); });
  addEventListener("blur", () => flip(false));

  list.style.setProperty("--pair", `${8.5 * data.models.length}rem`);
  update();
})();
