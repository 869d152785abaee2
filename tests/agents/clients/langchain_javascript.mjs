// LangChain.js, unmodified: a model with a tool, its result, and a streamed answer.
import { HumanMessage, SystemMessage, ToolMessage } from "@langchain/core/messages";
import { tool } from "@langchain/core/tools";
import { ChatOpenAI } from "@langchain/openai";
import { z } from "zod";

const [baseURL, apiKey] = process.argv.slice(2);
const stop = ["h", "i", "f", "p", "y", "w", "k"]; // none is in a call; a random model would hardly end its answer
const model = new ChatOpenAI({ model: "policy", apiKey, configuration: { baseURL }, maxTokens: 512, stop });
const add = tool(async ({ a, b }) => String(a + b), {
  name: "add",
  description: "Adds.",
  schema: z.object({ a: z.literal(2), b: z.literal(3) }),
});
const messages = [new SystemMessage("Add with the tool, then say the sum."), new HumanMessage("What is 2 + 3?")];
const reply = await model.bindTools([add], { tool_choice: "required", parallel_tool_calls: false }).invoke(messages);
const [call] = reply.tool_calls;
const result = await add.invoke(call);
if (!(result instanceof ToolMessage) || result.content !== "5") throw new Error(JSON.stringify(result));
messages.push(reply, result);
let answer = "";
const stream = await model.bindTools([add], { tool_choice: "none" }).stream(messages);
for await (const chunk of stream) answer += chunk.content;
console.log(JSON.stringify(answer));
process.exit(0); // the connections would be kept for a while
