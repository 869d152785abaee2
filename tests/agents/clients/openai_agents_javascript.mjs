// openai-agents for JavaScript, unmodified: an agent with a tool, streamed, over the Responses API and chat completions.
import { Agent, OpenAIChatCompletionsModel, OpenAIResponsesModel, run, setTracingDisabled, tool } from "@openai/agents";
import OpenAI from "openai";
import { z } from "zod";

const [baseURL, apiKey] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey });
setTracingDisabled(true); // else it reports to OpenAI
const add = tool({
  name: "add",
  description: "Adds.",
  parameters: z.object({ a: z.literal(2), b: z.literal(3) }),
  execute: async ({ a, b }) => String(a + b),
});
for (const model of [new OpenAIResponsesModel(client, "policy"), new OpenAIChatCompletionsModel(client, "policy")]) {
  const agent = new Agent({
    name: "Calculator",
    instructions: "Add with the tool, then say the sum.",
    tools: [add],
    model,
    // The choice is reset to "auto" after the first call.
    modelSettings: {
      toolChoice: "required",
      parallelToolCalls: false,
      maxTokens: 512,
      // None is in a call; a random model would hardly end its answer.
      providerData: { stop: ["h", "i", "f", "p", "y", "w", "k"] },
    },
  });
  const result = await run(agent, "What is 2 + 3?", { stream: true, maxTurns: 3 });
  await result.completed;
  const results = result.newItems.filter((item) => item.type === "tool_call_output_item");
  if (results.length !== 1 || results[0].output !== "5") throw new Error(JSON.stringify(result.newItems));
  console.log(JSON.stringify(result.finalOutput));
}
process.exit(0); // the connections would be kept for a while
