"use strict";
(() => {
  const root = document.documentElement, button = document.getElementById("theme");
  const names = {"light dark": "as the system", light: "light", dark: "dark"};
  const kept = () => { try { return localStorage.getItem("kd-theme"); } catch { return null; } };
  const set = (theme) => {
    root.style.colorScheme = theme;
    button.setAttribute("aria-label", `Theme: ${names[theme]}. Change it`);
    try { localStorage.setItem("kd-theme", theme); } catch { /* a page from a file may not remember */ }
  };
  if (names[kept()]) set(kept());
  button.addEventListener("click", () => {
    const order = Object.keys(names);
    set(order[(order.indexOf(root.style.colorScheme || "light dark") + 1) % order.length]);
  });

  const data = document.getElementById("costs");
  if (!data) return;
  const costs = JSON.parse(data.textContent), form = document.getElementById("assume");
  const W = 340, H = 230, L = 56, R = 12, T = 12, B = 40;
  const dashes = {student: "5 3", teacher: "", distilled: "", quantized: ""};
  const write = (x) => x === 0 ? "0" : Math.abs(x) >= 1e6 || Math.abs(x) < 1e-5 ? x.toExponential(1) : Number(x.toPrecision(3)).toLocaleString("en", {maximumFractionDigits: 8});
  const count = (x) => Number(Math.round(x).toPrecision(3)).toLocaleString("en");
  const span = (days) => days >= 2 ? `${write(days)} days` : days * 24 >= 2 ? `${write(days * 24)} hours` : `${write(days * 1440)} minutes`;
  const text = (value) => String(value).replace(/[&<>"]/g, (c) => `&#${c.charCodeAt(0)};`);

  const ticks = (top) => {
    const power = 10 ** Math.floor(Math.log10(top / 4)), step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => top / s <= 5);
    return Array.from({length: Math.floor(top / step + 1e-9) + 1}, (_, i) => i * step);
  };
  const time = (s) => s >= 7200 ? `${write(s / 3600)} hours` : s >= 120 ? `${write(s / 60)} minutes` : `${write(s)} seconds`;
  let first = true;

  const draw = () => {
    const of = (name) => form.elements[name], number = (name) => Math.max(0, Number(of(name).value) || 0);
    const requests = number("requests"), tries = number("tries") || 1;
    const teacher = of("given").checked ? 0 : costs.teacher;
    const lines = costs.options.map((o) => {
      const student = o.role === "student";
      const once = ((student ? 0 : teacher) + o.storing + o.training * tries) * number("train") / 3600;
      const daily = requests * (of("batch").checked ? o.batch : o.single) * number("serve") / 3600;
      return {...o, once, daily, seconds: requests * (of("batch").checked ? o.batch : o.single)};
    });
    const [large, small] = lines, saves = large.daily - small.daily, extra = small.once - large.once;
    const when = saves > 0 ? extra / saves : Infinity;
    if (first && Number.isFinite(when)) of("days").value = Math.max(0.1, Number((3 * when).toPrecision(1)));
    first = false;
    const days = number("days") || 1;
    const at = `at ${requests.toLocaleString("en")} requests a day`;
    const said = saves > 0
      ? `In the teacher's place, ${small.storing ? "the storing of its outputs and the student's training are" : "the student's training is"} paid back after ${span(when)} ${at}, or ${count(extra / (saves / requests))} requests. A day's requests then take ${time(small.seconds)} of computing with ${small.title}, and ${time(large.seconds)} with the teacher; the quality is ${small.quality} in place of ${large.quality}.`
      : `It is never paid back by serving ${at}: they take ${time(small.seconds)} of computing a day with ${small.title}, and ${time(large.seconds)} with the teacher.`;
    document.getElementById("paid").textContent = said.replaceAll(" %", "\u00a0%");
    const top = Math.max(...lines.map((l) => l.once + l.daily * days)) || 1;
    const x = (d) => L + d / days * (W - L - R), y = (c) => H - B - c / top * (H - T - B);
    let body = "";
    for (const c of ticks(top)) body += `<line class="grid" x1="${L}" x2="${W - R}" y1="${y(c)}" y2="${y(c)}"/><text class="tick" x="${L - 5}" y="${y(c) + 4}" text-anchor="end">${write(c)}</text>`;
    for (const d of ticks(days)) body += `<text class="tick" x="${x(d)}" y="${H - B + 16}" text-anchor="middle">${write(d)}</text>`;
    body += `<line class="axis" x1="${L}" x2="${W - R}" y1="${H - B}" y2="${H - B}"/><text class="title" x="${(L + W - R) / 2}" y="${H - 6}" text-anchor="middle">days</text>`;
    for (const l of lines) body += `<polyline class="line r-${l.role}" points="${x(0)},${y(l.once)} ${x(days)},${y(l.once + l.daily * days)}" stroke-dasharray="${dashes[l.role] || ""}"/>`;
    if (when > 0 && when < days) body += `<line class="mark" x1="${x(when)}" x2="${x(when)}" y1="${T}" y2="${H - B}"/>`;
    const alt = lines.map((l) => `${l.title}: ${write(l.once)} for training and ${write(l.daily)} a day`).join("; ");
    document.getElementById("break-even").innerHTML = `<svg class="figure" viewBox="0 0 ${W} ${H}" role="img" aria-label="${text(alt)}">${body}</svg>`;
    document.getElementById("break-even-legend").innerHTML = lines.map((l) => `<li><svg class="swatch" viewBox="0 0 28 14" aria-hidden="true"><line class="line r-${l.role}" x1="1" x2="27" y1="7" y2="7" stroke-dasharray="${dashes[l.role] || ""}"/></svg>${text(l.title)} (${text(l.quality)})</li>`).join("");
  };
  form.addEventListener("input", draw);
  form.addEventListener("submit", (event) => event.preventDefault());
  draw();
})();
