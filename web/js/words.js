// What the charts say, in the language of the front end, and the elements they are made of.

import { app } from "../../../scripts/app.js";

// English text -> translation, by the name of the language's folder under locales.
const TRANSLATED = {
  zh: {
    "Loss": "损失",
    "By timestep": "按时间步",
    "Samples": "样图",
    "Log scale": "对数刻度",
    "Chart view": "图表视图",
    "Visible losses": "显示的损失项",
    "total": "总损失",
    "task": "任务",
    "output": "输出",
    "feature": "特征",
    "local": "局部",
    "consistency": "一致性",
    "dmd": "分布匹配",
    "diversity": "多样性",
    "fake": "伪分数",
    "cosine_distance": "余弦距离",
    "validation": "验证",
    "step {0}": "第 {0} 步",
    "step {0} of {1}": "第 {0} 步，共 {1} 步",
    "{0} steps/s": "{0} 步/秒",
    "{0} s/step": "{0} 秒/步",
    "{0} left": "剩余 {0}",
    "{0} of {1} GiB": "已用 {0} / {1} GiB",
    "{0} s": "{0} 秒",
    "{0} min": "{0} 分",
    "{0} h": "{0} 小时",
    "{0} d": "{0} 天",
    "all timesteps": "全部时间步",
    "range {0}, timesteps {1} to {2}": "区间 {0}，时间步 {1} 至 {2}",
    "Run {0}: {1}": "任务 {0}：{1}",
    "Teacher above, student below, step {0}": "上为教师模型，下为学生模型，第 {0} 步",
    "No samples yet. They need a VAE, null_caption and, with a recipe, its sample_every_steps.": "还没有样图。样图需要 VAE 和空标注；连接配方时还要设置样图间隔步数。",
    "No measurements yet.": "还没有测量值。",
    "No run of this name yet. Queue to start it, or choose another under Runs.": "还没有这个名称的任务。运行即可开始，或在“任务”中选择其他任务。",
    "The chart appears when the training begins.": "训练开始后会显示图表。",
    "range {0}": "区间 {0}",
    "Runs": "任务",
    "New run": "新任务",
    "No runs yet.": "还没有任务。",
    "Another node gives the name.": "名称由其他节点给出。",
    "student": "学生模型",
    "experts": "专家模型",
    "Copy path": "复制路径",
    "Copied.": "已复制。",
    "Delete": "删除",
    "Delete run": "删除任务",
    "Delete run {0} and all its checkpoints ({1})? Models that were saved from it stay.":
      "要删除任务 {0} 及其全部检查点（{1}）吗？已从中保存的模型会保留。",
    "Deleted {0}.": "已删除 {0}。",
    "Stop and keep": "停止并保留",
    "Stops what is running now, after the current step; every finished step is kept.": "当前步结束后停止正在运行的任务；已完成的每一步都会保留。",
    "stopping": "正在停止",
  },
};

/** The language of the front end, such as `en`; `zh` for all of its kinds. */
export function language() {
  return (app.extensionManager?.setting?.get("Comfy.Locale") ?? navigator.language).split("-")[0];
}

/** A text in the language of the front end, with `{0}`, `{1}` filled in. */
export function say(text, ...values) {
  const said = TRANSLATED[language()]?.[text] ?? text;
  return said.replace(/\{(\d)\}/g, (_, index) => values[index]);
}

/** `3.4 GiB`, `12 MiB`. */
export function sayBytes(bytes) {
  return bytes >= 2 ** 30 ? `${(bytes / 2 ** 30).toFixed(1)} GiB` : `${Math.ceil(bytes / 2 ** 20)} MiB`;
}

export function html(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

export function button(text, press, attributes = {}, ...before) {
  const made = html("button", { type: "button", ...attributes }, ...before, text);
  made.addEventListener("click", press);
  return made;
}

/** A button that is on or off. */
export function toggle(text, on, press, attributes = {}, ...before) {
  return button(text, press, { "aria-pressed": on, ...attributes }, ...before);
}

